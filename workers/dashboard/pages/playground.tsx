/** The same prompt with the mask and without, streamed side by side through the edge, and why it got its mask. */
import { useEffect, useRef, useState } from 'preact/hooks';
import { listSchema, tenantSchema } from '../../../shared/admin.ts';
import type { DryRun } from '../../../shared/dry-run.ts';
import { modelListSchema, splitModelName } from '../../../shared/protocol.ts';
import { admin, failure } from '../api.ts';
import { Empty, Failure, Loaded } from '../components/notice.tsx';
import { useScope } from '../context.ts';
import { Answer, type Side } from '../playground/answer.tsx';
import { playgroundKey } from '../playground/key.ts';
import { explain, Routing } from '../playground/routing.tsx';
import { NO_PROGRESS, type Prompt, streamChat } from '../playground/stream.ts';
import { useLoad } from '../use-load.ts';

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
  const response = await fetch('/v1/models', { headers: { authorization: `Bearer ${key}` }, signal });
  if (!response.ok) throw await failure(response);
  const models = modelListSchema.parse(await response.json()).data.map(({ id }) => id);
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
