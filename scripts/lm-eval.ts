/**
 * Runs the real lm-evaluation-harness (`pip install "lm-eval[api]"`) against our own server, unchanged, over a
 * multiple-choice task made from a local JSONL file in ARC's form; once with token-id prompts, once with
 * batches of text. With `--reference FOLDER`, the harness scores the same rows with transformers (fp32), and
 * every log-likelihood is compared.
 *
 *     node scripts/lm-eval.ts --data arc_easy/test.jsonl [--model NAME] [--limit 100] [--python python3]
 *                             [--reference FOLDER_OR_GGUF_FILE]
 *
 * The last line is one JSON object. Skipped, with exit code 0, where Python or lm_eval is missing.
 */
import { spawn, spawnSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { pino } from 'pino';
import { maskrouteHome } from '../gpu-backend/home.ts';
import { startBackend } from '../gpu-backend/main.ts';
import { DEFAULT_MODEL } from '../gpu-backend/model/sources/default-model.ts';
import { modelsFolder } from '../gpu-backend/model/store.ts';

const { values: options } = parseArgs({
  options: {
    data: { type: 'string' },
    model: { type: 'string', default: DEFAULT_MODEL },
    limit: { type: 'string', default: '100' },
    python: { type: 'string', default: 'python3' },
    reference: { type: 'string' },
  },
});

const TASK = 'maskroute_arc';
const task = (data: string): string => `task: ${TASK}
dataset_path: json
dataset_kwargs:
  data_files:
    test: ${JSON.stringify(path.resolve(data))}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question.stem}}\\nAnswer:"
doc_to_choice: "{{question.choices | map(attribute='text') | list}}"
doc_to_target: "{{(question.choices | map(attribute='label') | list).index(answerKey)}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
`;

/** Log-likelihood and whether it is the greedy continuation, per question and choice. */
type Scores = { acc: number; accNorm: number; rows: { loglikelihood: number; greedy: boolean }[][] };

async function harness(folder: string, name: string, args: readonly string[], key: string): Promise<Scores> {
  const output = path.join(folder, name);
  const all = ['-m', 'lm_eval', ...args, '--tasks', TASK, '--include_path', folder];
  all.push('--limit', options.limit, '--output_path', output, '--log_samples');
  console.error(`${options.python} ${all.join(' ')}`);
  // No hub is needed: the task, the tokenizer and the data are local files.
  const env = { ...process.env, OPENAI_API_KEY: key, HF_HUB_OFFLINE: '1', HF_DATASETS_OFFLINE: '1' };
  const child = spawn(options.python, all, { env, stdio: ['ignore', 'ignore', 'inherit'] });
  const code = await new Promise((resolve) => child.once('exit', resolve));
  if (code !== 0) throw new Error(`lm_eval ended with code ${code}`);
  return readScores(output);
}

async function readScores(output: string): Promise<Scores> {
  const files = await readdir(output, { recursive: true });
  const read = async (prefix: string) => {
    const file = files.find((entry) => path.basename(entry).startsWith(prefix));
    return readFile(path.join(output, file ?? prefix), 'utf8');
  };
  const { results } = JSON.parse(await read('results_'));
  const samples = (await read('samples_'))
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line));
  samples.sort((a, b) => a.doc_id - b.doc_id);
  const rows = samples.map(({ resps }) =>
    resps.map(([[value, greedy]]: [[string, string]]) => ({
      loglikelihood: Number(value),
      greedy: String(greedy) === 'True' || String(greedy) === 'true',
    })),
  );
  const figures = results[TASK];
  return { acc: figures['acc,none'], accNorm: figures['acc_norm,none'], rows };
}

function compare(ours: Scores, reference: Scores) {
  const pairs = ours.rows.flatMap((row, index) =>
    row.map((choice, position) => [choice, reference.rows[index]![position]!] as const),
  );
  const differences = pairs.map(([a, b]) => a.loglikelihood - b.loglikelihood);
  const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const best = (row: Scores['rows'][number]) =>
    row.reduce((top, { loglikelihood }, i) => (loglikelihood > row[top]!.loglikelihood ? i : top), 0);
  const samePick = ours.rows.map((row, index) => Number(best(row) === best(reference.rows[index]!)));
  return {
    loglikelihoods: pairs.length,
    meanReference: mean(pairs.map(([, b]) => b.loglikelihood)),
    meanDifference: mean(differences),
    meanAbsoluteDifference: mean(differences.map(Math.abs)),
    maxAbsoluteDifference: Math.max(...differences.map(Math.abs)),
    greedyAgreement: mean(pairs.map(([a, b]) => Number(a.greedy === b.greedy))),
    pickAgreement: mean(samePick),
  };
}

async function main(): Promise<void> {
  if (options.data === undefined) throw new Error('--data FILE is missing');
  if (spawnSync(options.python, ['-c', 'import lm_eval']).status !== 0) {
    console.log(JSON.stringify({ skipped: `${options.python} has no lm_eval` }));
    return;
  }
  const home = maskrouteHome();
  const folder = await mkdtemp(path.join(tmpdir(), 'lm-eval-'));
  const key = randomBytes(24).toString('hex');
  const log = pino({ level: 'silent' });
  const backend = await startBackend({ home, model: options.model, port: 0, backendKey: key, log });
  try {
    await writeFile(path.join(folder, `${TASK}.yaml`), task(options.data));
    const tokenizer = path.join(modelsFolder(home), options.model);
    const local = (extra: string) => [
      ...['--model', 'local-completions', '--model_args'],
      `model=${options.model},base_url=${backend.url}/v1/completions,tokenizer=${tokenizer},` +
        `tokenizer_backend=huggingface,max_length=8192,${extra}`,
    ];
    const tokenIds = await harness(folder, 'ids', local('tokenized_requests=True,num_concurrent=2'), key);
    const batches = [...local('tokenized_requests=False,num_concurrent=1'), '--batch_size', '4'];
    const text = await harness(folder, 'text', batches, key);
    const reference =
      options.reference === undefined
        ? undefined
        : await harness(folder, 'reference', transformers(options.reference), '');
    const summary = (scores: Scores) => ({
      acc: scores.acc,
      acc_norm: scores.accNorm,
      ...(reference === undefined ? {} : compare(scores, reference)),
    });
    console.log(
      JSON.stringify({
        model: options.model,
        limit: Number(options.limit),
        tokenIds: summary(tokenIds),
        text: summary(text),
        ...(reference && { reference: { acc: reference.acc, acc_norm: reference.accNorm } }),
      }),
    );
  } finally {
    await backend.close();
    await rm(folder, { recursive: true, force: true });
  }
}

function transformers(model: string): string[] {
  const gguf = model.endsWith('.gguf');
  const where = gguf
    ? `pretrained=${path.dirname(model)},gguf_file=${path.basename(model)}`
    : `pretrained=${model}`;
  const args = `${where},dtype=float32,backend=causal`;
  return ['--model', 'hf', '--model_args', args, '--device', 'cpu', '--batch_size', '8'];
}

await main();
