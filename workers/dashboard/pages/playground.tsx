/** The same prompt with the mask and without, streamed side by side through the edge, and why it got its mask. */

import { useEffect, useRef, useState } from 'preact/hooks';
import { listSchema, tenantSchema } from '../../../shared/admin/admin-wire.ts';
import { type DryRun, dryRunSchema } from '../../../shared/wire/openai.ts';
import { HEADERS, modelListSchema, splitModelName } from '../../../shared/wire/protocol.ts';
import { admin } from '../api.ts';
import { Empty, Failure, Loaded } from '../components/notice.tsx';
import { type FactList, Facts } from '../components/table.tsx';
import { useLoad, useScope } from '../hooks.ts';
import { number, percent } from '../look.ts';
import {
  askEdge,
  chatBody,
  NO_PROGRESS,
  type Progress,
  type Prompt,
  playgroundKey,
  streamChat,
} from './playground-stream.ts';

const TOKENS = { default: 120, max: 1024 };

export function Playground() {
  const { tenant } = useScope();
  const ready = useLoad((signal) => prepare(tenant, signal), [tenant]);
  return (
    <Loaded load={ready}>
      {(found) =>
        found === null ? (
          <Empty>Requests need a tenant: make one first.</Empty>
        ) : (
          <Bench tenant={found.tenant} models={found.models} />
        )
      }
    </Loaded>
  );
}

/** The tenant whose key is used (the first one when all are in view) and what it may ask for. */
async function prepare(tenant: string, signal: AbortSignal) {
  const { data } = await admin(listSchema(tenantSchema), '/tenants', { signal });
  const used = tenant === '' ? data[0]?.id : tenant;
  if (used === undefined) return null;
  const key = await playgroundKey(used);
  const { data: served } = modelListSchema.parse(await (await askEdge(key, '/v1/models', { signal })).json());
  const models = served.map(({ id }) => id);
  return { tenant: used, models: models.filter((id) => !splitModelName(id).dense) };
}

const SIDES = ['dense', 'masked'] as const;
type Sides = Record<(typeof SIDES)[number], Side>;
const IDLE: Sides = { dense: { state: 'idle' }, masked: { state: 'idle' } };

function Bench({ tenant, models }: { readonly tenant: string; readonly models: readonly string[] }) {
  const [sides, setSides] = useState<Sides>(IDLE);
  const [decision, setDecision] = useState<DryRun>();
  const [error, setError] = useState<Error>();
  const running = useRef<AbortController | null>(null);
  const isRunning = SIDES.some((name) => sides[name].state === 'running');
  // Leaving the page hangs up, and the engine stops with it.
  useEffect(() => () => running.current?.abort(), []);

  const run = async (prompt: Prompt, isInTurn: boolean) => {
    const controller = new AbortController();
    running.current = controller;
    const { signal } = controller;
    setSides(IDLE);
    setError(undefined);
    setDecision(undefined);
    try {
      const key = await playgroundKey(tenant);
      setDecision(await explain(key, prompt, signal));
      const stream = (name: (typeof SIDES)[number]) => streamSide(name, key, prompt, setSides, signal);
      if (isInTurn) for (const name of SIDES) await stream(name);
      else await Promise.all(SIDES.map(stream));
    } catch (thrown) {
      if (!signal.aborted) setError(thrown as Error);
    }
  };
  const submit = (event: SubmitEvent) => {
    event.preventDefault();
    const form = new FormData(event.currentTarget as HTMLFormElement);
    const prompt = {
      model: String(form.get('model')),
      text: String(form.get('prompt')),
      tokensMax: Number(form.get('tokens')),
      temperature: Number(form.get('temperature')),
    };
    void run(prompt, form.get('turns') !== null);
  };

  return (
    <>
      <PromptForm
        tenant={tenant}
        models={models}
        isRunning={isRunning}
        onSubmit={submit}
        onStop={() => running.current?.abort()}
      />
      {error !== undefined && <Failure error={error} />}
      <div class="sides">
        <Answer title="Dense" side={sides.dense} />
        <Answer title="Masked" side={sides.masked} />
      </div>
      {decision !== undefined && <Routing decision={decision} />}
    </>
  );
}

async function streamSide(
  name: (typeof SIDES)[number],
  key: string,
  prompt: Prompt,
  setSides: (change: (before: Sides) => Sides) => void,
  signal: AbortSignal,
): Promise<void> {
  let last = NO_PROGRESS;
  const show = (side: Side) => setSides((before) => ({ ...before, [name]: side }));
  show({ state: 'running', progress: last });
  try {
    const onProgress = (progress: typeof last) => {
      last = progress;
      show({ state: progress.isDone ? 'done' : 'running', progress });
    };
    await streamChat(key, prompt, name, onProgress, signal);
  } catch (error) {
    show(
      signal.aborted
        ? { state: 'stopped', progress: last }
        : { state: 'failed', progress: last, error: error as Error },
    );
  }
}

function PromptForm(props: {
  readonly tenant: string;
  readonly models: readonly string[];
  readonly isRunning: boolean;
  readonly onSubmit: (event: SubmitEvent) => void;
  readonly onStop: () => void;
}) {
  return (
    <form onSubmit={props.onSubmit}>
      <label>
        Prompt
        <textarea name="prompt" rows={3} required maxLength={20_000}>
          Why is the sky blue?
        </textarea>
      </label>
      <div class="row">
        <label>
          Model
          <select name="model">
            {props.models.map((id) => (
              <option key={id}>{id}</option>
            ))}
          </select>
        </label>
        <label>
          Tokens at most
          <input
            name="tokens"
            type="number"
            min={1}
            max={TOKENS.max}
            defaultValue={String(TOKENS.default)}
            required
          />
        </label>
        <label>
          Temperature
          <input name="temperature" type="number" min={0} max={2} step="0.1" defaultValue="0" required />
        </label>
      </div>
      <label>
        <input name="turns" type="checkbox" />
        One after the other, so that neither slows the other down
      </label>
      <div class="row">
        <button type="submit" disabled={props.isRunning} aria-busy={props.isRunning}>
          Run
        </button>
        <button type="button" class="secondary" disabled={!props.isRunning} onClick={props.onStop}>
          Stop
        </button>
        <small>Runs as the tenant {props.tenant}, with a key that expires within the hour.</small>
      </div>
    </form>
  );
}

/* One of the two answers: its text as it comes, and its speed. */

type Side =
  | { readonly state: 'idle' }
  | { readonly state: 'running' | 'done' | 'stopped'; readonly progress: Progress }
  | { readonly state: 'failed'; readonly progress: Progress; readonly error: Error };

function Answer({ title, side }: { readonly title: string; readonly side: Side }) {
  const progress = side.state === 'idle' ? undefined : side.progress;
  const decision = progress?.decision ?? {};
  return (
    <article class="answer" aria-label={title}>
      <header>
        <h2>{title}</h2>
        <small>
          {decision[HEADERS.mask] !== undefined && (
            <>
              mask <code>{decision[HEADERS.mask]}</code>, {percent(Number(decision[HEADERS.sparsity] ?? 0))}{' '}
              of the blocks out
            </>
          )}
        </small>
      </header>
      <p class="text" aria-live="polite" aria-busy={side.state === 'running'}>
        {progress?.text}
      </p>
      {side.state === 'failed' && <Failure error={side.error} />}
      <footer>
        <small>{progress === undefined ? 'Nothing was run yet.' : speed(progress)}</small>
        {side.state === 'stopped' && <small> Stopped.</small>}
      </footer>
    </article>
  );
}

function speed({ tokens, first_ms, perToken_ms }: Progress): string {
  const first =
    first_ms === null ? 'waiting for the first token' : `first token after ${number(first_ms)} ms`;
  const rate = perToken_ms === null ? '' : `, then ${number(perToken_ms, 1)} ms a token`;
  return `${first}${rate}, ${tokens} tokens`;
}

/* Why the prompt got its mask: the dry run's answer, in words and as a row of blocks. */

/** @throws ApiError */
async function explain(key: string, prompt: Prompt, signal: AbortSignal): Promise<DryRun> {
  const response = await askEdge(key, '/v1/route', { body: chatBody(prompt, 'masked'), signal });
  return dryRunSchema.parse(await response.json());
}

function Routing({ decision }: { readonly decision: DryRun }) {
  const { maskroute, label, distance, skip, sparsity, encoder, timings_ms: timings } = decision;
  const facts: FactList = [
    ['Mask set', maskroute.mask_set == null ? 'none' : `${maskroute.mask_set} ${maskroute.version ?? ''}`],
    [
      'Cluster',
      maskroute.cluster == null ? 'none' : `${maskroute.cluster}${label === null ? '' : `: ${label}`}`,
    ],
    ['Distance', number(distance, 3)],
    ['Cosine', number(maskroute.similarity ?? null, 3)],
    ['Blocks out', sparsity === null ? 'unknown at the edge' : percent(sparsity)],
    ['Attention skipped', layersOf(skip?.attention)],
    ['FFN skipped', layersOf(skip?.ffn)],
    ['Encoder', encoder === null ? 'none was needed' : `${encoder.id}, ${encoder.dimensions} dimensions`],
    ['Experiment', `${maskroute.experiment ?? 'none'} / ${maskroute.variant ?? '–'}`],
    ['Region', maskroute.region ?? '–'],
    ['Time', `assign ${timings.assign}, embed ${timings.embed}, route ${timings.route} ms`],
  ];
  return (
    <section aria-label="How the prompt was routed">
      <h2>Routing</h2>
      {maskroute.fallback != null && (
        <p>The request runs dense: {maskroute.fallback.replaceAll('_', ' ')}.</p>
      )}
      <Facts facts={facts} />
    </section>
  );
}

const layersOf = (layers: readonly number[] | undefined): string =>
  layers === undefined ? 'unknown at the edge' : layers.length === 0 ? 'none' : `layers ${layers.join(', ')}`;
