/**
 * `npm run lm-eval`: compares our scoring with the real lm-evaluation-harness (`pip install "lm-eval[api]" transformers`), with
 * its own task definitions, on local files of the six multiple-choice sets. The harness scores our server, once with
 * token-id prompts and once with batches of text; `maskroute evaluate`'s code scores the same rows. With `--reference` the
 * harness also scores them with transformers (fp32, needs torch), and all others are compared with that.
 * The last line is one JSON object. Skipped, with exit code 0, when Python or lm_eval is missing.
 */
import { spawn, spawnSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import path from 'node:path';
import { pino } from 'pino';
import { newCommand, parseScript, sayError } from '../gpu-backend/cli/help.ts';
import { wholeNumber } from '../gpu-backend/cli/terminal.ts';
import { openRunner } from '../gpu-backend/engine/runner.ts';
import { maskrouteHome } from '../gpu-backend/files.ts';
import type { Question, Task } from '../gpu-backend/learning/evaluation/tasks/read-task.ts';
import { hasNorm, parseTaskFile, readTask } from '../gpu-backend/learning/evaluation/tasks/read-task.ts';
import {
  encodeChoices,
  highest,
  judge,
  scoreChoices,
} from '../gpu-backend/learning/evaluation/tasks/score-question.ts';
import { openScoreSession } from '../gpu-backend/learning/search/score-masks.ts';
import { startBackend } from '../gpu-backend/main.ts';
import { average } from '../gpu-backend/measure.ts';
import { DEFAULT_MODEL } from '../gpu-backend/model/sources/resolve.ts';
import { modelsFolder, openInstalled } from '../gpu-backend/model/store.ts';
import { openModelText } from '../gpu-backend/model/tokenizer/model-text.ts';
import { denseMask } from '../shared/mask/mask.ts';

type Options = {
  readonly tasks: string[];
  readonly model: string;
  readonly limit: number;
  readonly python: string;
  readonly reference?: string;
};
const options = parseScript<Options>(
  newCommand(
    'npm run lm-eval --',
    'compare our scoring with lm-evaluation-harness; the last line is one JSON object',
  )
    .requiredOption('--tasks <file...>', 'local files of multiple-choice sets, as TASK=FILE')
    .option('--model <name>', 'an installed model', DEFAULT_MODEL)
    .option('--limit <count>', 'questions of each task at most', wholeNumber(1), 100)
    .option('--python <program>', 'a Python that has lm_eval', 'python3')
    .option('--reference <source>', 'a folder or GGUF file of the model, which transformers scores too'),
  ['npm run lm-eval -- --tasks winogrande=winogrande/dev.jsonl piqa=piqa/valid.jsonl --limit 20'],
);
const home = maskrouteHome();

/** Each task's definition in the harness' folder. */
const DEFINITIONS: Record<Task, string> = {
  openbookqa: 'openbookqa/openbookqa.yaml',
  winogrande: 'winogrande/default.yaml',
  hellaswag: 'hellaswag/hellaswag.yaml',
  piqa: 'piqa/piqa.yaml',
  arc_easy: 'arc/arc_easy.yaml',
  arc_challenge: 'arc/arc_challenge.yaml',
};

/** `logLikelihoods`: of each choice, for each question. */
type Scores = { acc: number; accNorm: number | null; logLikelihoods: number[][] };

async function main(): Promise<void> {
  const files = options.tasks.map(parseTaskFile);
  const found = spawnSync(options.python, ['-c', 'import lm_eval.tasks as t; print(t.__file__)']);
  if (found.status !== 0) {
    console.log(JSON.stringify({ skipped: `${options.python} has no lm_eval` }));
    return;
  }
  const definitions = path.dirname(found.stdout.toString().trim());
  const folder = await mkdtemp(path.join(tmpdir(), 'lm-eval-'));
  const key = randomBytes(24).toString('hex');
  const log = pino({ level: 'silent' });
  const backend = await startBackend({ home, model: options.model, port: 0, backendKey: key, log });
  try {
    const tasks = [];
    for (const { task, path: file } of files) {
      const questions = await readTask({ task, path: file }, options.limit);
      const name = await writeTask(folder, definitions, task, await hubRows(task, file, questions));
      const ours = await scoreOurselves(task, questions);
      const byHarness = (args: readonly string[], run: string) =>
        harness(args, name, folder, path.join(folder, `${name}-${run}`), key);
      const tokenIds = await byHarness(served(backend.url, 'tokenized_requests=True'), 'ids');
      const batches = [...served(backend.url, 'tokenized_requests=False'), '--batch_size', '4'];
      const text = await byHarness(batches, 'text');
      const reference = options.reference && (await byHarness(transformers(options.reference), 'reference'));
      const against = (scores: Scores) => compare(scores, reference || tokenIds);
      tasks.push({
        task,
        questions: questions.length,
        comparedWith: reference ? 'reference' : 'tokenIds',
        ours: against(ours),
        tokenIds: against(tokenIds),
        text: against(text),
        ...(reference && { reference: against(reference) }),
      });
    }
    console.log(JSON.stringify({ model: options.model, tasks }));
  } finally {
    await backend.close();
    await rm(folder, { recursive: true });
  }
}

/** The rows with the columns of the Hugging Face data sets, which the harness' definitions expect. */
async function hubRows(task: Task, file: string, questions: readonly Question[]): Promise<object[]> {
  const lines = (await readFile(file, 'utf8')).split('\n').filter((line) => line.trim() !== '');
  return questions.map((question, index) => {
    const row = JSON.parse(lines[index]!) as Record<string, unknown>;
    if (task === 'piqa') return { ...row, label: question.gold };
    if (task === 'winogrande' || task === 'hellaswag') return row;
    const stem = (row.question as { stem?: string } | undefined)?.stem ?? row.question_stem ?? row.question;
    const text = question.choices.map(({ continuation }) => continuation.slice(1));
    const label = [...'ABCDEFGH'].slice(0, text.length);
    return { question: stem, question_stem: stem, choices: { text, label }, answerKey: label[question.gold] };
  });
}

/** Writes a task that includes the harness' definition, and uses these rows. Returns its name. */
async function writeTask(folder: string, definitions: string, task: Task, rows: readonly object[]) {
  const name = `maskroute_${task}`;
  const data = path.join(folder, `${name}.jsonl`);
  await writeFile(data, rows.map((row) => `${JSON.stringify(row)}\n`).join(''));
  const yaml = {
    include: path.join(definitions, DEFINITIONS[task]),
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
  return name;
}

/** Arguments of the harness for our server. */
const served = (url: string, how: string): string[] => [
  ...['--model', 'local-completions', '--model_args'],
  `model=${options.model},base_url=${url}/v1/completions,num_concurrent=1,max_length=8192,${how},` +
    `tokenizer=${path.join(modelsFolder(home), options.model)},tokenizer_backend=huggingface`,
];

function transformers(model: string): string[] {
  const where = model.endsWith('.gguf')
    ? `pretrained=${path.dirname(model)},gguf_file=${path.basename(model)}`
    : `pretrained=${model}`;
  const args = `${where},dtype=float32,backend=causal`;
  return ['--model', 'hf', '--model_args', args, '--device', 'cpu', '--batch_size', '8'];
}

async function harness(
  model: readonly string[],
  task: string,
  folder: string,
  output: string,
  key: string,
): Promise<Scores> {
  const args = ['-m', 'lm_eval', ...model, '--tasks', task, '--include_path', folder];
  args.push('--output_path', output, '--log_samples');
  console.error(`${options.python} ${args.join(' ')}`);
  // The hub is not needed: task, tokenizer and data are local files.
  const env = { ...process.env, OPENAI_API_KEY: key, HF_HUB_OFFLINE: '1', HF_DATASETS_OFFLINE: '1' };
  const child = spawn(options.python, args, { env, stdio: ['ignore', 'ignore', 'inherit'] });
  const code = await new Promise((resolve) => child.once('exit', resolve));
  if (code !== 0) throw new Error(`lm_eval ended with code ${code}`);
  const files = await readdir(output, { recursive: true });
  const read = (prefix: string) =>
    readFile(
      path.join(output, files.find((file) => path.basename(file).startsWith(prefix)) ?? prefix),
      'utf8',
    );
  const figures = JSON.parse(await read('results_')).results[task];
  const samples = (await read('samples_'))
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line));
  samples.sort((a, b) => a.doc_id - b.doc_id);
  return {
    acc: figures['acc,none'],
    accNorm: figures['acc_norm,none'] ?? null,
    logLikelihoods: samples.map(({ resps }) => resps.map(([[value]]: [[string, string]]) => Number(value))),
  };
}

/** Scores with the code of `maskroute evaluate`. */
async function scoreOurselves(task: Task, questions: readonly Question[]): Promise<Scores> {
  const threads = availableParallelism();
  const { folder, manifest } = await openInstalled(home, options.model);
  const text = await openModelText(folder, manifest);
  const runner = await openRunner(folder, manifest.config, { threads });
  const session = await openScoreSession(threads);
  const parts = { runner, session, cache: runner.newCache() };
  const mask = denseMask(2 * manifest.config.layerCount);
  const logLikelihoods: number[][] = [];
  for (const question of questions) {
    const choices = encodeChoices(question, text.tokenizer, manifest.config.contextTokens);
    logLikelihoods.push(await scoreChoices(parts, choices, mask));
  }
  await session.close();
  await runner.close();
  const judged = questions.map((question, i) => judge(question, logLikelihoods[i]!));
  return {
    acc: average(judged.map(({ acc }) => acc)),
    accNorm: hasNorm(task) ? average(judged.map(({ accNorm }) => accNorm)) : null,
    logLikelihoods,
  };
}

function compare({ acc, accNorm, logLikelihoods }: Scores, other: Scores) {
  const differences = logLikelihoods.flatMap((row, i) =>
    row.map((value, choice) => value - other.logLikelihoods[i]![choice]!),
  );
  const samePick = logLikelihoods.map((row, i) => Number(highest(row) === highest(other.logLikelihoods[i]!)));
  return {
    acc,
    acc_norm: accNorm,
    meanDifference: average(differences),
    meanAbsoluteDifference: average(differences.map(Math.abs)),
    maxAbsoluteDifference: Math.max(...differences.map(Math.abs)),
    pickAgreement: average(samePick),
  };
}

await main().catch(sayError);
