/** `POST /v1/embeddings` in OpenAI's wire format, and `GET /v1/encoders`: what a mask set would be made for. */
import { Hono } from 'hono';
import type { EncoderEntry } from '../../shared/wire/backend-load.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import { readFields } from '../../shared/wire/fields.ts';
import { embeddingsRequest } from '../../shared/wire/openai.ts';
import { type ApiEnv, type ApiParts, setHeaders } from './parts.ts';

export const embeddingRoutes = ({ bodies, encoders, lifecycle, metrics }: ApiParts): Hono<ApiEnv> =>
  new Hono<ApiEnv>()
    .get('/v1/encoders', async (c) => {
      const found = await encoders.installed();
      const data: EncoderEntry[] =
        found === undefined ? [] : [{ id: found.id, object: 'maskroute.encoder', encoder: found.spec }];
      return c.json({ object: 'list', data });
    })
    .post('/v1/embeddings', async (c) => {
      lifecycle.stopping.throwIfAborted();
      const raw = await bodies.readJson(c.req.raw, c.get('caller').tenant);
      const { body: request, ignored } = readFields(embeddingsRequest, raw);
      setHeaders(c, ignored);
      const texts = typeof request.input === 'string' ? [request.input] : request.input;
      const { vectors, tokens } = await encoders.embed(request.model, texts, c.req.raw.signal);
      const width = vectors[0]!.length;
      if (request.dimensions != null && request.dimensions !== width) {
        const message = `dimensions: this encoder has ${width}, and its vectors are not made to be cut.`;
        throw new MaskrouteError('invalid_request', message, { param: 'dimensions' });
      }
      metrics.request('embeddings', 200, 'ok');
      const encode = request.encoding_format === 'base64' ? toBase64 : toNumbers;
      return c.json({
        object: 'list',
        model: request.model,
        data: vectors.map((vector, index) => ({ object: 'embedding', index, embedding: encode(vector) })),
        usage: { prompt_tokens: tokens, total_tokens: tokens },
      });
    });

const toNumbers = (vector: Float32Array): number[] => [...vector];
/** 32-bit floats, little-endian: what this machine's are, as on every machine that ONNX Runtime supports. */
const toBase64 = ({ buffer, byteOffset, byteLength }: Float32Array): string =>
  Buffer.from(buffer, byteOffset, byteLength).toString('base64');
