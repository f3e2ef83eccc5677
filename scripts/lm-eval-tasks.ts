/**
 * Our own scoring of the six multiple-choice sets against the real lm-evaluation-harness (`pip install "lm-eval[api]"`),
 * with the harness's own task files, driving our own server on the same rows.
 *
 *     node scripts/lm-eval-tasks.ts --tasks winogrande=winogrande/dev.jsonl piqa=piqa/valid.jsonl [--limit 100]
 *                                   [--model NAME] [--python python3]
 *
 * The last line is one JSON object. Skipped, with exit code 0, where Python or lm_eval is missing.
 */
import { spawn, spawnSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { pino } from 'pino';
import { openRunner } from '../gpu-backend/engine/runner.ts';
import { maskrouteHome } from '../gpu-backend/home.ts';
import type { Question, Task } from '../gpu-backend/learning/evaluation/tasks/read-task.ts';
import { hasNorm, parseTaskFile, readTask } from '../gpu-backend/learning/evaluation/tasks/read-task.ts';
import {
  encodeChoices,
  judge,
  scoreChoices,
} from '../gpu-backend/learning/evaluation/tasks/score-question.ts';
import { openScoreSession } from '../gpu-backend/learning/search/score-masks.ts';
import { startBackend } from '../gpu-backend/main.ts';
import { openModelText } from '../gpu-backend/model/model-text.ts';
import { DEFAULT_MODEL } from '../gpu-backend/model/sources/default-model.ts';
import { modelsFolder, openInstalled } from '../gpu-backend/model/store.ts';
import { denseMask } from '../shared/mask.ts';

const { values: options } = parseArgs({
  options: {
    tasks: { type: 'string', multiple: true, default: [] },
    model: { type: 'string', default: DEFAULT_MODEL },
    limit: { type: 'string', default: '100' },
    python: { type: 'string', default: 'python3' },
  },
});
const limit = Number(options.limit);
const home = maskrouteHome();

type Scores = { acc: number; accNorm: number | null; logLikelihoods: number[][] };

/** Where the harness keeps each task's own definition. */
const DEFINITIONS: Record<Task, string> = {
  openbookqa: 'openbookqa/openbookqa.yaml',
  winogrande: 'winogrande/default.yaml',
  hellaswag: 'hellaswag/hellaswag.yaml',
  piqa: 'piqa/piqa.yaml',
  arc_easy: 'arc/arc_easy.yaml',
  arc_challenge: 'arc/arc_challenge.yaml',
};

type Raw = Record<string, unknown>;

/** Rows in the columns of the hub, which the harness's definitions expect. */
async function hubRows(task: Task, file: string, questions: readonly Question[]): Promise<Raw[]> {
  const lines = (await readFile(file, 'utf8')).split('\n').filter((line) => line.trim() !== '');
  return questions.map((question, index) => {
    const row = JSON.parse(lines[index]!) as Raw;
    const letters = [...'ABCDEFGH'];
    if (task === 'piqa') return { ...row, label: question.gold };
    if (task === 'winogrande' || task === 'hellaswag') return row;
    const stem = (row.question as { stem?: string } | undefined)?.stem ?? row.question_stem ?? row.question;
    const text = question.choices.map(({ continuation }) => continuation.slice(1));
    const choices = { text, label: letters.slice(0, text.length) };
    return { question: stem, question_stem: stem, choices, answerKey: letters[question.gold] };
  });
}

async function byHarness(
  folder: string,
  task: Task,
  rows: readonly Raw[],
  url: string,
  key: string,
): Promise<Scores> {
  const tasksFolder = spawnSync(options.python, [
    '-c',
    'import lm_eval.tasks, os; print(os.path.dirname(lm_eval.tasks.__file__))',
  ]);
  const definition = path.join(tasksFolder.stdout.toString().trim(), DEFINITIONS[task]);
  const name = `maskroute_${task}`;
  const data = path.join(folder, `${name}.jsonl`);
  await writeFile(data, rows.map((row) => `${JSON.stringify(row)}\n`).join(''));
  const yaml = {
    include: definition,
    task: name,
    dataset_path: 'json',
    dataset_name: null,
    dataset_kwargs: { data_files: { validation: data } },
    training_split: null,
    validation_split: 'validation',
    test_split: null,
  };
  // JSON is YAML.
  await writeFile(path.join(folder, `${name}.yaml`), JSON.stringify(yaml));
  const output = path.join(folder, 'output', task);
  const tokenizer = path.join(modelsFolder(home), options.model);
  const args = ['-m', 'lm_eval', '--model', 'local-completions', '--model_args'];
  args.push(
    `model=${options.model},base_url=${url}/v1/completions,tokenizer=${tokenizer},` +
      'tokenizer_backend=huggingface,max_length=8192,tokenized_requests=True,num_concurrent=1',
  );
  args.push('--tasks', name, '--include_path', folder, '--output_path', output, '--log_samples');
  const env = { ...process.env, OPENAI_API_KEY: key, HF_HUB_OFFLINE: '1', HF_DATASETS_OFFLINE: '1' };
  const child = spawn(options.python, args, { env, stdio: ['ignore', 'ignore', 'inherit'] });
  const code = await new Promise((resolve) => child.once('exit', resolve));
  if (code !== 0) throw new Error(`lm_eval ended with code ${code}`);
  return readHarness(output, name);
}

async function readHarness(output: string, name: string): Promise<Scores> {
  const files = await readdir(output, { recursive: true });
  const read = (prefix: string) => {
    const file = files.find((entry) => path.basename(entry).startsWith(prefix));
    return readFile(path.join(output, file ?? prefix), 'utf8');
  };
  const figures = JSON.parse(await read('results_')).results[name];
  const samples = (await read('samples_'))
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line))
    .sort((a, b) => a.doc_id - b.doc_id);
  return {
    acc: figures['acc,none'],
    accNorm: figures['acc_norm,none'] ?? null,
    logLikelihoods: samples.map(({ resps }) => resps.map(([[value]]: [[string, string]]) => Number(value))),
  };
}

async function byUs(task: Task, questions: readonly Question[]): Promise<Scores & { perSecond: number }> {
  const { folder, manifest } = await openInstalled(home, options.model);
  const text = await openModelText(folder, manifest);
  const runner = await openRunner(folder, manifest.config, { threads: availableParallelism() });
  const session = await openScoreSession(availableParallelism());
  const parts = { runner, session, cache: runner.newCache() };
  const mask = denseMask(2 * manifest.config.layerCount);
  const start = performance.now();
  const logLikelihoods: number[][] = [];
  for (const question of questions) {
    const choices = encodeChoices(question, text.tokenizer, manifest.config.contextTokens);
    logLikelihoods.push(await scoreChoices(parts, choices, mask));
  }
  const perSecond = (1000 * questions.length) / (performance.now() - start);
  await session.close();
  await runner.close();
  const judged = questions.map((question, i) => judge(question, logLikelihoods[i]!));
  return {
    acc: mean(judged.map(({ acc }) => acc)),
    accNorm: hasNorm(task) ? mean(judged.map(({ accNorm }) => accNorm)) : null,
    logLikelihoods,
    perSecond,
  };
}

const mean = (values: readonly number[]): number =>
  values.reduce((sum, value) => sum + value, 0) / values.length;

async function compare(folder: string, argument: string, url: string, key: string) {
  const file = parseTaskFile(argument);
  const questions = await readTask(file, limit);
  const ours = await byUs(file.task, questions);
  const rows = await hubRows(file.task, file.path, questions);
  const theirs = await byHarness(folder, file.task, rows, url, key);
  const differences = ours.logLikelihoods.flatMap((row, i) =>
    row.map((value, choice) => Math.abs(value - theirs.logLikelihoods[i]![choice]!)),
  );
  return {
    task: file.task,
    questions: questions.length,
    ours: { acc: ours.acc, acc_norm: ours.accNorm },
    harness: { acc: theirs.acc, acc_norm: theirs.accNorm },
    standardError: Math.sqrt((theirs.acc * (1 - theirs.acc)) / Math.max(1, questions.length - 1)),
    meanAbsoluteDifference: mean(differences),
    maxAbsoluteDifference: Math.max(...differences),
    questionsPerSecond: ours.perSecond,
  };
}

async function main(): Promise<void> {
  if (options.tasks.length === 0) throw new Error('--tasks TASK=FILE is missing');
  if (spawnSync(options.python, ['-c', 'import lm_eval']).status !== 0) {
    console.log(JSON.stringify({ skipped: `${options.python} has no lm_eval` }));
    return;
  }
  const folder = await mkdtemp(path.join(tmpdir(), 'lm-eval-'));
  const key = randomBytes(24).toString('hex');
  const log = pino({ level: 'silent' });
  const backend = await startBackend({ home, model: options.model, port: 0, backendKey: key, log });
  try {
    const tasks = [];
    for (const argument of options.tasks) tasks.push(await compare(folder, argument, backend.url, key));
    console.log(JSON.stringify({ model: options.model, tasks }));
  } finally {
    await backend.close();
    await rm(folder, { recursive: true });
  }
}

await main();
