/**
 * The same prompt with and without a mask, streamed side by side through the edge, and why it got its mask. It runs as
 * a tenant that the person chooses, and takes part in no experiment.
 */

import { diffWordsWithSpace } from 'diff';
import type { ComponentChildren } from 'preact';
import { useEffect, useMemo, useRef, useState } from 'preact/hooks';
import { type DryRun, dryRunSchema } from '../../../shared/wire/openai.ts';
import { modelListSchema, splitModelName } from '../../../shared/wire/protocol.ts';
import { Choice, TenantChoice, useSetsToPick } from '../components/controls.tsx';
import { Empty, Failure, Loaded } from '../components/dialog.tsx';
import { type FactList, Facts } from '../components/table.tsx';
import { loadMaskSet, useAddress, useCopy, useLoad, useScope, useUnsaved } from '../hooks.ts';
import { experimentName, number, percent, shortVersion } from '../look.ts';
import {
  askEdge,
  chatBody,
  curlOf,
  NO_PROGRESS,
  type Progress,
  type Prompt,
  perToken_ms,
  streamChat,
} from './playground-stream.ts';

const TOKENS = { default: 120, max: 1024 };

export function Playground() {
  const scope = useScope();
  const [picked, pick] = useAddress('as', '');
  const tenant = scope.tenant === '' ? picked : scope.tenant;
  return (
    <>
      {scope.tenant === '' && (
        <div class="row">
          <TenantChoice title="Run as the tenant" value={tenant} onPick={pick} />
        </div>
      )}
      {tenant === '' ? (
        <Empty>Pick a tenant: the prompt runs with its limits, its budget and its mask set.</Empty>
      ) : (
        <Ready key={tenant} tenant={tenant} />
      )}
    </>
  );
}

function Ready({ tenant }: { readonly tenant: string }) {
  const models = useLoad(['playground', tenant], (signal) => modelsOf(tenant, signal));
  return (
    <Loaded load={models}>
      {(found) =>
        found.length === 0 ? (
          <Empty>No backend serves a model that {tenant} may use.</Empty>
        ) : (
          <Bench tenant={tenant} models={found} />
        )
      }
    </Loaded>
  );
}

/** The models that the tenant may ask for. */
async function modelsOf(tenant: string, signal: AbortSignal): Promise<readonly string[]> {
  const answer = await askEdge(tenant, '/v1/models', { signal });
  const { data: served } = modelListSchema.parse(await answer.json());
  return served.map(({ id }) => id).filter((id) => !splitModelName(id).dense);
}

const SIDES = ['dense', 'masked'] as const;
type Sides = Record<(typeof SIDES)[number], Side>;
const IDLE: Sides = { dense: { state: 'idle' }, masked: { state: 'idle' } };

function Bench({ tenant, models }: { readonly tenant: string; readonly models: readonly string[] }) {
  const [sides, setSides] = useState<Sides>(IDLE);
  const [decision, setDecision] = useState<DryRun>();
  const [error, setError] = useState<Error>();
  const running = useRef<AbortController | null>(null);
  const [isRunning, setRunning] = useState(false);
  // Leaving the page hangs up, and the engine stops with it.
  useEffect(() => () => running.current?.abort(), []);

  const run = async (prompt: Prompt, isInTurn: boolean) => {
    const controller = new AbortController();
    running.current = controller;
    const { signal } = controller;
    setRunning(true);
    setSides(IDLE);
    setError(undefined);
    setDecision(undefined);
    try {
      setDecision(await explain(tenant, prompt, signal));
      const stream = (name: (typeof SIDES)[number]) => streamSide(name, tenant, prompt, setSides, signal);
      if (isInTurn) for (const name of SIDES) await stream(name);
      else await Promise.all(SIDES.map(stream));
    } catch (thrown) {
      if (!signal.aborted) setError(thrown as Error);
    }
    setRunning(false);
  };

  return (
    <>
      <PromptForm
        tenant={tenant}
        models={models}
        isRunning={isRunning}
        onRun={(prompt, isInTurn) => void run(prompt, isInTurn)}
        onStop={() => running.current?.abort()}
      />
      {error !== undefined && <Failure error={error} />}
      <div class="sides">
        <Answer title="Dense" side={sides.dense} />
        <Answer title="Masked" side={sides.masked} />
      </div>
      {sides.dense.state === 'done' && sides.masked.state === 'done' && (
        <Difference dense={sides.dense.progress.text} masked={sides.masked.progress.text} />
      )}
      {decision !== undefined && <Routing decision={decision} />}
    </>
  );
}

/** The difference between the masked and the dense answer. */
function Difference({ dense, masked }: { readonly dense: string; readonly masked: string }) {
  const parts = useMemo(() => diffWordsWithSpace(dense, masked), [dense, masked]);
  const isSame = parts.every(({ added, removed }) => !added && !removed);
  return (
    <section aria-label="Difference">
      <h2>Difference</h2>
      {isSame ? (
        <p>Both answers are the same.</p>
      ) : (
        <p class="difference">
          {parts.map(({ value, added, removed }, index) => {
            if (added) return <ins key={index}>{value}</ins>;
            if (removed) return <del key={index}>{value}</del>;
            return value;
          })}
        </p>
      )}
    </section>
  );
}

async function streamSide(
  name: (typeof SIDES)[number],
  tenant: string,
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
    await streamChat(tenant, prompt, name, onProgress, signal);
  } catch (error) {
    show(
      signal.aborted
        ? { state: 'stopped', progress: last }
        : { state: 'failed', progress: last, error: error as Error },
    );
  }
}

/** Live routing, a stored set, or one cluster's mask of a set. */
function useMaskChoice(tenant: string) {
  const { load, find } = useSetsToPick(tenant === '' ? [''] : [tenant, '']);
  const sets = load.state === 'ready' ? load.data : [];
  const [version, setVersion] = useAddress('set', '');
  const [mask, setMask] = useAddress('mask', '');
  const picked = sets.some((set) => set.version === version) ? version : '';
  const set = useLoad(['mask set', tenant, picked || null], (signal) =>
    picked === '' ? Promise.resolve(null) : loadMaskSet(picked, tenant, signal),
  );
  const clusters = set.state === 'ready' ? (set.data?.clusters ?? []) : [];
  const held = clusters.some((cluster) => cluster.mask === mask) ? mask : '';
  const element = (
    <>
      {find}
      <Choice
        title="Mask set"
        value={picked}
        options={[
          ['', 'what is live'],
          ...sets.map(({ version: of, name }) => [of, `${name} ${shortVersion(of)}`] as const),
        ]}
        onPick={setVersion}
      />
      {picked !== '' && (
        <Choice
          title="Mask"
          value={held}
          options={[
            ['', 'of the nearest cluster'],
            ...clusters.map(
              ({ mask: of, label }, at) =>
                [of, `cluster ${at}${label === undefined ? '' : `: ${label}`}`] as const,
            ),
          ]}
          onPick={setMask}
        />
      )}
    </>
  );
  return { version: picked || undefined, mask: held || undefined, element };
}

function PromptForm(props: {
  readonly tenant: string;
  readonly models: readonly string[];
  readonly isRunning: boolean;
  readonly onRun: (prompt: Prompt, isInTurn: boolean) => void;
  readonly onStop: () => void;
}) {
  const { version, mask, element } = useMaskChoice(props.tenant);
  const { isCopied, error: copyError, copy, forget } = useCopy();
  const [isTouched, setTouched] = useState(false);
  useUnsaved(isTouched);
  const form = useRef<HTMLFormElement>(null);
  const promptIn = (fields: FormData): Prompt => ({
    model: String(fields.get('model')),
    system: String(fields.get('system')),
    text: String(fields.get('prompt')),
    tokensMax: Number(fields.get('tokens')),
    temperature: Number(fields.get('temperature')),
    version,
    mask,
  });
  const submit = (event: SubmitEvent) => {
    event.preventDefault();
    const fields = new FormData(form.current!);
    props.onRun(promptIn(fields), fields.get('turns') !== null);
  };
  return (
    <form
      ref={form}
      onSubmit={submit}
      onInput={() => {
        forget();
        setTouched(true);
      }}
      onKeyDown={(event) => {
        if (event.key === 'Enter' && (event.ctrlKey || event.metaKey) && !props.isRunning)
          form.current!.requestSubmit();
      }}
    >
      <PromptFields models={props.models} mask={element} />
      <div class="row">
        <button type="submit" disabled={props.isRunning} aria-busy={props.isRunning} title="Ctrl+Enter">
          Run
        </button>
        <button type="button" class="secondary" disabled={!props.isRunning} onClick={props.onStop}>
          Stop
        </button>
        <button
          type="button"
          class="outline"
          onClick={() => copy(curlOf(location.origin, promptIn(new FormData(form.current!))))}
        >
          {isCopied ? 'Copied' : 'Copy as curl'}
        </button>
        <small>
          Ctrl+Enter runs it as the tenant {props.tenant}, with a key that expires within the hour. It counts
          towards the tenant’s budget, is marked as “playground”, and takes part in no experiment.
        </small>
      </div>
      {copyError !== undefined && <Failure error={copyError} />}
    </form>
  );
}

/** `mask`: the fields that choose one. */
const PromptFields = (props: { readonly models: readonly string[]; readonly mask: ComponentChildren }) => (
  <>
    <label>
      System prompt (empty: none)
      <textarea name="system" rows={2} maxLength={20_000} />
    </label>
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
      {props.mask}
      <label>
        Max tokens
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
      <input name="turns" type="checkbox" defaultChecked />
      One after the other, so that neither slows the other down
    </label>
  </>
);

/* One of the two answers: its text as it comes, and its speed. */

type Side =
  | { readonly state: 'idle' }
  | { readonly state: 'running' | 'done' | 'stopped'; readonly progress: Progress }
  | { readonly state: 'failed'; readonly progress: Progress; readonly error: Error };

function Answer({ title, side }: { readonly title: string; readonly side: Side }) {
  const progress = side.state === 'idle' ? undefined : side.progress;
  const mask = progress?.mask ?? null;
  return (
    <article class="answer" aria-label={title}>
      <header>
        <h2>{title}</h2>
        <small>
          {mask !== null && (
            <>
              mask <code>{mask.id}</code>, {percent(mask.sparsity)} of the blocks skipped
            </>
          )}
        </small>
      </header>
      <p class="text" aria-live="polite" aria-busy={side.state === 'running'}>
        {progress?.text}
      </p>
      {side.state === 'failed' && <Failure error={side.error} />}
      <footer>
        <small>
          {progress === undefined ? 'Nothing was run yet.' : speed(progress, side.state === 'running')}
        </small>
        {side.state === 'stopped' && <small> Stopped.</small>}
      </footer>
    </article>
  );
}

function speed(progress: Progress, isRunning: boolean): string {
  const { tokens, first_ms } = progress;
  if (first_ms === null) return isRunning ? 'waiting for the first token' : 'no text came';
  const mean_ms = perToken_ms(progress);
  const rate = mean_ms === null ? '' : `, then ${number(mean_ms, 1)} ms/token`;
  return `first token after ${number(first_ms)} ms${rate}, ${tokens} ${tokens === 1 ? 'token' : 'tokens'}`;
}

/* Why the prompt got its mask: the dry run's answer, as text and as a row of blocks. */

/** @throws ApiError */
async function explain(tenant: string, prompt: Prompt, signal: AbortSignal): Promise<DryRun> {
  const response = await askEdge(tenant, '/v1/route', { body: chatBody(prompt, 'masked'), prompt, signal });
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
    ['Blocks skipped', sparsity === null ? 'unknown at the edge' : percent(sparsity)],
    ['Attention skipped', layersOf(skip?.attention)],
    ['FFN skipped', layersOf(skip?.ffn)],
    ['Encoder', encoder === null ? 'none was needed' : `${encoder.id}, ${encoder.dimensions} dimensions`],
    ['Experiment', experimentName(maskroute.experiment ?? 'none', maskroute.variant ?? '–')],
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
