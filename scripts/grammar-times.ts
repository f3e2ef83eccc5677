/**
 * `node scripts/grammar-times.ts`: what grammars cost on the default model's vocabulary. The last line is one JSON object, in ms:
 * the thread's time for the tokens that may follow, the engine's for waiting and for its logits, and how long a new schema
 * takes until its answer may begin.
 */
import { SequenceGrammar } from '../gpu-backend/engine/grammar.ts';
import { maskrouteHome } from '../gpu-backend/files.ts';
import { createGrammars } from '../gpu-backend/grammar/grammars.ts';
import { schemaGrammar } from '../gpu-backend/grammar/json-schema.ts';
import { openCompiler } from '../gpu-backend/grammar/xgrammar.ts';
import { DEFAULT_MODEL } from '../gpu-backend/model/sources/default-model.ts';
import { openInstalled } from '../gpu-backend/model/store.ts';
import { openModelText } from '../gpu-backend/model/tokenizer/model-text.ts';
import { seededRandom } from '../gpu-backend/random.ts';

const STEPS_MAX = 200;
/** What the model computes meanwhile. */
const STEP_ms = 5;

const strict = (properties: Record<string, unknown>) => ({
  ...{ type: 'object', properties, required: Object.keys(properties), additionalProperties: false },
});
const SCHEMAS: Record<string, unknown> = {
  object: { type: 'object' },
  person: strict({
    name: { type: 'string' },
    age: { type: 'integer', minimum: 0, maximum: 150 },
    mood: { enum: ['happy', 'sad'] },
  }),
  steps: strict({
    steps: { type: 'array', items: strict({ explanation: { type: 'string' }, output: { type: 'string' } }) },
    answer: { type: 'string' },
  }),
  formats: strict({
    email: { type: 'string', format: 'email' },
    at: { type: 'string', format: 'date-time' },
  }),
  counted: strict({ city: { type: 'string', maxLength: 40 } }),
  wide: strict(
    Object.fromEntries(Array.from({ length: 100 }, (_, i) => [`property_${i}`, { type: 'number' }])),
  ),
};

const { folder, manifest } = await openInstalled(maskrouteHome(), DEFAULT_MODEL);
const { tokenizer } = await openModelText(folder, manifest);
const size = manifest.config.vocabularySize;
const endTokenId = manifest.eosTokenIds[0]!;
const vocabulary = { table: tokenizer.table, size, endTokenId };
const compiler = await openCompiler(vocabulary);
const grammars = createGrammars({ vocabulary, onError: (detail) => console.error(detail) });
const call = { tenant: '', signal: new AbortController().signal, param: 'schema' };
const at = (values: readonly number[], share: number): number =>
  Number(values.toSorted((a, b) => a - b)[Math.floor(share * (values.length - 1))]!.toFixed(3));

const rows: Record<string, object> = {};
for (const [name, schema] of Object.entries(SCHEMAS)) {
  const spec = { answer: schemaGrammar(schema, { strict: true, param: 'schema' }), calls: undefined };
  const begun_ms = performance.now();
  const open = await grammars.open(await grammars.prepare(spec, call), call);
  const ready_ms = performance.now() - begun_ms;
  const matcher = await (await compiler.compile(spec)).match();
  const grammar = new SequenceGrammar(open.session);
  const random = seededRandom(1);
  const [thread_ms, engine_ms] = [[] as number[], [] as number[]];
  for (let step = 0; step < STEPS_MAX; step++) {
    const started_ms = performance.now();
    await matcher.allowed();
    const found_ms = performance.now();
    const logits = new Float32Array(size);
    const restricting_ms = performance.now();
    grammar.restrict(logits, [endTokenId]);
    const done_ms = performance.now();
    thread_ms.push(found_ms - started_ms);
    engine_ms.push(done_ms - restricting_ms);
    const ids = [...logits.keys()].filter((id) => logits[id] === 0);
    const id = ids[Math.floor(random() * ids.length)]!;
    if (id === endTokenId) break;
    matcher.accept(id);
    grammar.accept(id);
    await new Promise((resolve) => setTimeout(resolve, STEP_ms));
  }
  rows[name] = {
    ...{ steps: thread_ms.length, ready: at([ready_ms], 0) },
    thread: { median: at(thread_ms, 0.5), p99: at(thread_ms, 0.99) },
    engine: { median: at(engine_ms, 0.5), p99: at(engine_ms, 0.99) },
  };
  matcher.close();
  open.close();
  console.log(name, JSON.stringify(rows[name]));
}
await grammars.close();
console.log(JSON.stringify(rows));
