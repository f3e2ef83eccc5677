/** Buttons and form fields, and reading their values. */
import type { ComponentChildren } from 'preact';
import { useEffect, useRef, useState } from 'preact/hooks';
import { listSchema } from '../../../shared/admin/admin-wire.ts';
import {
  type MaskSetSummary,
  maskSetSummarySchema,
  type PublishBody,
} from '../../../shared/admin/publication-wire.ts';
import { admin, edgeNow_ms, query } from '../api.ts';
import {
  type Loading,
  namedSchema,
  useAddress,
  useAddressOf,
  useAnswer,
  useLoad,
  useScope,
} from '../hooks.ts';
import { Failure } from './dialog.tsx';

/** A select that applies at once. `options`: values with their titles, in order. */
export function Choice<T extends string>(props: {
  readonly title: string;
  readonly value: T;
  readonly options: readonly (readonly [value: string, title: string])[];
  readonly onPick: (value: T) => void;
  /** In a form: the name of the field. */
  readonly name?: string | undefined;
  readonly class?: string | undefined;
  readonly required?: boolean;
  readonly onFocus?: () => void;
}) {
  return (
    <label class={props.class}>
      {props.title}
      <select
        name={props.name}
        value={props.value}
        required={props.required === true}
        onFocus={props.onFocus}
        onChange={(event) => props.onPick(event.currentTarget.value as T)}
      >
        {props.options.map(([value, title]) => (
          <option key={value} value={value}>
            {title}
          </option>
        ))}
      </select>
    </label>
  );
}

/** A button in a table row. Its accessible name includes the row's name. */
export function RowButton(props: {
  readonly title: string;
  readonly about: string;
  readonly onClick: () => void;
  readonly destroys?: boolean;
  /** True if it only shows something; other buttons change something and are hidden from viewers. */
  readonly reads?: boolean;
}) {
  const { mayChange } = useScope();
  if (!mayChange && props.reads !== true) return null;
  return (
    <button
      type="button"
      class={props.destroys === true ? 'small danger outline' : 'small outline'}
      onClick={props.onClick}
    >
      {props.title} <span class="hidden">{props.about}</span>
    </button>
  );
}

/** Hides its children from viewers. */
export const ForChange = ({ children }: { readonly children: ComponentChildren }) =>
  useScope().mayChange ? children : null;

export type SearchProps = {
  readonly title: string;
  readonly value: string;
  readonly onSearch: (text: string) => void;
};

/** A search whose text is in the URL as `name`. `q`: the parameter of a list; undefined without a search. */
export function useSearch(
  title: string,
  name = 'q',
): { readonly q: string | undefined; readonly search: SearchProps } {
  const [value, onSearch] = useAddress(name, '');
  return { q: value || undefined, search: { title, value, onSearch } };
}

/** A search field; it searches when the person stops typing or presses Enter, and not after the page is left. */
export function Search(props: SearchProps) {
  const field = useRef<HTMLInputElement>(null);
  const searched = useRef(props.value);
  const timer = useRef<ReturnType<typeof setTimeout>>();
  useEffect(() => () => clearTimeout(timer.current), []);
  // A link or the back button can also change the search.
  useEffect(() => {
    if (props.value === searched.current) return;
    clearTimeout(timer.current);
    searched.current = props.value;
    field.current!.value = props.value;
  }, [props.value]);
  const search = (text: string, wait_ms: number) => {
    clearTimeout(timer.current);
    timer.current = setTimeout(() => {
      searched.current = text.trim();
      props.onSearch(searched.current);
    }, wait_ms);
  };
  return (
    <label class="search">
      {props.title}
      <input
        ref={field}
        type="search"
        maxLength={200}
        defaultValue={props.value}
        onInput={(event) => search(event.currentTarget.value, 250)}
        onKeyDown={(event) => {
          if (event.key !== 'Enter') return;
          // The field may be in a form, which Enter must not submit.
          event.preventDefault();
          search(event.currentTarget.value, 0);
        }}
      />
    </label>
  );
}

/* Fields for choosing ids from a list. */

const SHOWN_MAX = 200;

/** Tenants to choose from: the newest, or the results of a search; always includes the chosen one. */
function useTenantIds(
  picked: string,
  q = '',
): { readonly ids: readonly string[]; readonly isCut: boolean; readonly reload: () => void } {
  const path = `/tenants${query({ limit: SHOWN_MAX, q: q || undefined })}`;
  const found = useAnswer(listSchema(namedSchema), path);
  const ids = found.state === 'ready' ? found.data.data.map(({ id }) => id) : [];
  const isCut = found.state === 'ready' && found.data.has_more === true;
  return { ids: picked === '' || ids.includes(picked) ? ids : [picked, ...ids], isCut, reload: found.reload };
}

/** Checkboxes for tenants. If there are many, a search field adds its results. */
export function TenantBoxes(props: { readonly title: string; readonly none: string; readonly name: string }) {
  const known = useRef(new Set<string>());
  const wasCut = useRef(false);
  const [q, setQ] = useState('');
  const { ids, isCut } = useTenantIds('', q);
  for (const id of ids) known.current.add(id);
  wasCut.current ||= isCut;
  return (
    <>
      {wasCut.current && <Search title="Find more tenants" value={q} onSearch={setQ} />}
      <Several {...props} options={[...known.current]} picked={[]} />
    </>
  );
}

/** A select for a tenant. If there are more than a list should have, a search field finds the others. */
export function TenantChoice(props: {
  readonly title: string;
  readonly value: string;
  /** Title of the empty value; absent: a tenant must be chosen. */
  readonly none?: string;
  readonly onPick: (tenant: string) => void;
  readonly name?: string;
  readonly class?: string;
}) {
  const [q, setQ] = useState('');
  const { ids, isCut, reload } = useTenantIds(props.value, q);
  const none = props.none ?? (props.value === '' ? 'pick one' : undefined);
  return (
    <>
      {(isCut || q !== '') && <Search title="Find a tenant" value={q} onSearch={setQ} />}
      <Choice
        {...props}
        required={props.none === undefined}
        options={[
          ...(none === undefined ? [] : [['', none] as const]),
          ...ids.map((id) => [id, id] as const),
        ]}
        onFocus={reload}
      />
    </>
  );
}

/**
 * Mask sets to choose from: the newest of each owner, and all search results. `find`: a search field that adds to the
 * list, if an owner has more. Listed sets stay, so that a chosen set does not disappear.
 */
export function useSetsToPick(owners: readonly string[]): {
  readonly load: Loading<readonly MaskSetSummary[]>;
  readonly find: ComponentChildren;
} {
  const known = useRef(new Map<string, MaskSetSummary>());
  const isCut = useRef(false);
  const [q, setQ] = useState('');
  const found = useLoad(['sets to pick', owners, q], (signal) =>
    Promise.all(
      owners.map((tenant) => {
        const path = `/mask-sets${query({ tenant, limit: SHOWN_MAX, q: q || undefined })}`;
        return admin(listSchema(maskSetSummarySchema), path, { signal });
      }),
    ),
  );
  for (const list of found.state === 'ready' ? found.data : []) {
    isCut.current ||= list.has_more === true;
    for (const set of list.data) known.current.set(set.version, set);
  }
  const data = [...known.current.values()];
  const load: Loading<readonly MaskSetSummary[]> =
    found.state === 'ready' || data.length > 0 ? { ...found, state: 'ready', data, stale: null } : found;
  return { load, find: isCut.current && <Search title="Find more mask sets" value={q} onSearch={setQ} /> };
}

/** Checkboxes for the models that backends serve, and for picked ones that no backend serves now. */
export function ModelBoxes({ picked }: { readonly picked: readonly string[] }) {
  const found = useAnswer(listSchema(namedSchema), '/models');
  const served = found.state === 'ready' ? found.data.data.map(({ id }) => id) : [];
  return (
    <>
      {found.state === 'failed' && <Failure error={found.error} retry={found.reload} />}
      <Several
        title="Models"
        none="none selected: all"
        name="models"
        options={[...new Set([...served, ...picked])]}
        picked={picked}
      />
    </>
  );
}

/** Checkboxes for any of several values; `none`: what it means if none is checked. */
export const Several = (props: {
  readonly title: string;
  readonly none: string;
  readonly name: string;
  readonly options: readonly string[];
  readonly picked: readonly string[];
}) => (
  <fieldset class="several">
    <legend>
      {props.title} <small>({props.none})</small>
    </legend>
    {props.options.map((option) => (
      <label key={option}>
        <input
          type="checkbox"
          name={props.name}
          value={option}
          defaultChecked={props.picked.includes(option)}
        />
        {option}
      </label>
    ))}
  </fieldset>
);

/* Fields for names and times, which a browser checks before anything is sent. */

/** The id of a tenant, an experiment or a backend. */
export const IdField = () => (
  <label>
    Id
    <input
      name="id"
      required
      pattern="[a-z0-9][a-z0-9\-]{0,62}"
      title="lower-case letters, digits and dashes, at most 63"
    />
  </label>
);

/** `required` alone takes spaces, which nobody can read in a list. */
export const NameField = ({ preset }: { readonly preset?: string | undefined }) => (
  <label>
    Name
    <input
      name="name"
      required
      maxLength={200}
      pattern=".*\S.*"
      title="not only spaces"
      defaultValue={preset}
    />
  </label>
);

/** `title` says what an empty field means. Years of five digits are no times of JSON. */
export const TimeField = ({ name, title }: { readonly name: string; readonly title: string }) => (
  <label>
    {title}
    <input name={name} type="datetime-local" max="9999-12-30T23:59" />
  </label>
);

/** The items of a text field that takes several, separated by commas or spaces. */
export const itemsIn = (form: FormData, name: string, separator = /,/): string[] =>
  (form.get(name)?.toString() ?? '')
    .split(separator)
    .map((item) => item.trim())
    .filter((item) => item !== '');

/** A field's local time as an ISO time, under the field's name; empty if the field is empty. */
export function timeIn(form: FormData, name: string): Record<string, string> {
  const value = form.get(name)?.toString();
  return value === undefined ? {} : { [name]: new Date(value).toISOString() };
}

/**
 * The same where a time in the past would mean at once, which nobody asks for by a time. The field has no seconds, so the
 * present minute is not past. @throws Error
 */
export function timeAheadIn(form: FormData, name: string): Record<string, string> {
  const time = timeIn(form, name);
  const minute_ms = Math.floor(edgeNow_ms() / 60_000) * 60_000;
  if (time[name] === undefined || Date.parse(time[name]) >= minute_ms) return time;
  throw new Error(`${name}: is in the past.`);
}

/* The time range of a page, kept in the URL. */

const HOUR_ms = 3_600_000;
const RANGES = {
  hour: { title: 'last hour', step: 'minute', step_ms: 60_000, steps: 60 },
  day: { title: 'last 24 hours', step: 'hour', step_ms: HOUR_ms, steps: 24 },
  week: { title: 'last 7 days', step: 'hour', step_ms: HOUR_ms, steps: 168 },
  month: { title: 'last 30 days', step: 'day', step_ms: 24 * HOUR_ms, steps: 30 },
} as const;
export type Range = (typeof RANGES)[keyof typeof RANGES] & { readonly name: string };

export function useRange(): { readonly range: Range; readonly picker: preact.JSX.Element } {
  const [name, setName] = useAddressOf('range', Object.keys(RANGES) as (keyof typeof RANGES)[], 'day');
  const options = Object.entries(RANGES).map(([value, { title }]) => [value, title] as const);
  return {
    range: { ...RANGES[name], name },
    picker: <Choice title="Time" value={name} options={options} onPick={setName} />,
  };
}

/** Start of the range by the edge's clock; the range consists of whole steps and includes the current step. */
export function startOf_ms({ step_ms, steps }: Range): number {
  return Math.floor(edgeNow_ms() / step_ms) * step_ms - (steps - 1) * step_ms;
}

/* Form fields for a rollout and automatic rollback, in minutes and percent. */

/** Shares of conversations that see the new version at the steps of a rollout. */
const STEP_SHARES = [0.01, 0.1];

export const RolloutFields = () => (
  <>
    <label>
      <input name="gradual" type="checkbox" />
      Step by step: 1 %, 10 %, then every conversation
    </label>
    <label>
      Minutes a step
      <input name="duration_s" type="number" min={1} max={1440} defaultValue="10" required />
    </label>
    <label>
      Roll back at an error rate above, % (empty: never)
      <input name="error_rate_max" type="number" min={0} max={99} step="any" />
    </label>
    <label>
      Roll back when ms/token is above this multiple of the previous version’s (empty: never)
      <input name="tpot_ratio_max" type="number" min={1.01} step="any" />
    </label>
  </>
);

export function rolloutIn(form: FormData): Pick<PublishBody, 'rollout' | 'auto_rollback'> {
  const errors = form.get('error_rate_max');
  const ratio = form.get('tpot_ratio_max');
  const duration_s = Math.round(60 * Number(form.get('duration_s')));
  return {
    ...(form.get('gradual') === null ? {} : { rollout: STEP_SHARES.map((share) => ({ share, duration_s })) }),
    ...(errors === null && ratio === null
      ? {}
      : {
          auto_rollback: {
            ...(errors === null ? {} : { error_rate_max: Number(errors) / 100 }),
            ...(ratio === null ? {} : { tpot_ratio_max: Number(ratio) }),
          },
        }),
  };
}
