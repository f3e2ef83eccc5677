/** Configurations that lie: whatever stands in config.json, the answer is a configuration or a MaskrouteError, at once. */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { decoderTensors } from '../../../../gpu-backend/model/families.ts';
import { configFromHuggingFace } from '../../../../gpu-backend/model/formats/hf-folder.ts';
import { MaskrouteError } from '../../../../shared/wire/errors.ts';
import figures from '../architectures/fixtures/families.json' with { type: 'json' };

const hostile = fc.oneof(
  fc.constantFrom<unknown>(null, -1, 0, 1, 7, 1e308, 2 ** 53, 0.5, '', 'x', true, false, [], {}, [1e9], [-1]),
  fc.constantFrom({ rope_type: 'yarn' }, { rope_type: 'llama3', factor: 0 }, { type: 'linear', factor: -1 }),
  fc.jsonValue(),
);
const change = fc.record({ at: fc.nat(60), value: hostile });

test('with fields changed, it is read or refused with a reason', () => {
  const outcomes = { read: 0, refused: 0 };
  const before = process.cpuUsage();
  fc.assert(
    fc.property(
      fc.constantFrom(...figures.variants.map(({ config }) => config)),
      fc.array(change, { minLength: 1, maxLength: 3 }),
      (config, changes) => {
        const keys = Object.keys(config);
        const changed = Object.fromEntries(changes.map(({ at, value }) => [keys[at % keys.length]!, value]));
        try {
          decoderTensors(configFromHuggingFace({ ...config, ...changed }));
          outcomes.read++;
        } catch (error) {
          if (!(error instanceof MaskrouteError)) throw error;
          expect(['corrupt_model', 'unsupported_model']).toContain(error.code);
          outcomes.refused++;
        }
      },
    ),
    { seed: 8, numRuns: 1500 },
  );
  const { user, system } = process.cpuUsage(before);
  expect((user + system) / 1000 / 1500, 'ms of the processor each').toBeLessThan(20);
  expect(outcomes.read).toBeGreaterThan(100);
  expect(outcomes.refused).toBeGreaterThan(100);
});

test('what a file leaves out is as transformers has it for the family', () => {
  const least = (model_type: string) =>
    configFromHuggingFace({
      ...{ model_type, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2 },
      ...{ num_attention_heads: 4, vocab_size: 100 },
    });
  const common = { kvHeadCount: 4, headSize: 16, ropeTheta: 10_000, tiedEmbeddings: false };
  const none = { embedding: 1, blocks: 1, scores: 1, logits: 1 };
  expect(least('llama')).toMatchObject({ ...common, contextTokens: 2048, rmsEpsilon: 1e-6 });
  expect(least('granite')).toMatchObject({ ...common, contextTokens: 2048, factors: none });
  expect(least('phi3')).toMatchObject({ ...common, contextTokens: 4096, rmsEpsilon: 1e-5 });
  expect(least('phi3').slidingWindow).toBeUndefined();
});

test('rotary tables of gigabytes are refused: a small file can ask for them', () => {
  const config = { ...figures.variants[0]!.config, hidden_size: 16, num_attention_heads: 1 };
  const asking = (head_dim: number) =>
    configFromHuggingFace({ ...config, num_key_value_heads: 1, head_dim, max_position_embeddings: 2 ** 20 });
  expect(asking(256).headSize).toBe(256);
  expect(() => asking(512)).toThrow(/rotary tables of 1048576 positions and 512 dimensions/);
});
