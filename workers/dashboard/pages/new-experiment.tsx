/** The form for a new experiment: a draft, so that it can be looked at before it is started. */

import { useState } from 'preact/hooks';
import { DENSE_VARIANT, experimentSchema, type PlaceScope } from '../../../shared/admin/experiment-wire.ts';
import { STICKY_KINDS } from '../../../shared/mask/sticky.ts';
import { admin } from '../api.ts';
import {
  Choice,
  IdField,
  itemsIn,
  ModelBoxes,
  TenantBoxes,
  TimeField,
  timeIn,
  useSetsToPick,
} from '../components/controls.tsx';
import { FormDialog, Loaded } from '../components/dialog.tsx';
import { publicationInUse, useLoad, useScope } from '../hooks.ts';
import { shortVersion } from '../look.ts';

const VARIANT_NAMES = ['A', 'B', 'C', 'D', 'E', 'F'];

export function NewExperiment({ onClose }: { readonly onClose: () => void }) {
  const { tenant } = useScope();
  const [variants, setVariants] = useState(2);
  const { load: sets, find } = useSetsToPick([tenant]);
  const inUse = useLoad(['set in use', tenant], (signal) =>
    tenant === '' ? Promise.resolve(null) : publicationInUse(tenant, signal),
  );
  const isCompared = variants > 1;
  const submit = async (form: FormData) => {
    await admin(experimentSchema, '/experiments', { method: 'POST', body: bodyOf(form, tenant, variants) });
    onClose();
  };
  return (
    <FormDialog
      title="New experiment"
      action="Create the draft"
      isReady={sets.state === 'ready' && inUse.state !== 'loading'}
      onClose={onClose}
      onSubmit={submit}
    >
      <IdField />
      <label>
        Description
        <input name="description" maxLength={2000} />
      </label>
      <Loaded load={sets}>
        {(found) => (
          <>
            {find}
            {VARIANT_NAMES.slice(0, variants).map((name, index) => (
              <VariantFields
                key={name}
                name={name}
                isControl={index === 0}
                isCompared={isCompared}
                sets={withInUse(found, inUse.state === 'ready' ? inUse.data : null)}
              />
            ))}
          </>
        )}
      </Loaded>
      <div class="row">
        {variants < VARIANT_NAMES.length && (
          <button type="button" class="small outline" onClick={() => setVariants(variants + 1)}>
            Add a variant
          </button>
        )}
        {isCompared && (
          <button type="button" class="small outline" onClick={() => setVariants(variants - 1)}>
            Remove variant {VARIANT_NAMES[variants - 1]}
          </button>
        )}
      </div>
      {isCompared ? (
        <label>
          Sticky unit: always gets the same variant
          <select name="sticky">
            {STICKY_KINDS.map((kind) => (
              <option key={kind} value={kind}>
                {kind.replaceAll('_', ' ')}
              </option>
            ))}
          </select>
        </label>
      ) : (
        <p>
          One variant is a set for everybody: all requests from the regions below get it, and no variants are
          compared.
        </p>
      )}
      <ScopeFields isShared={tenant === ''} />
      <div class="pairs">
        <Share name="shadow_share" title="Requests compared with dense, %" preset="1" min={0} />
        {isCompared && <Share name="alpha" title="Significance level, %" preset="5" min={0.1} />}
      </div>
    </FormDialog>
  );
}

/** Sets that a search adds come last, so that the default and the choice stay. */
function VariantFields(props: {
  readonly name: string;
  readonly isControl: boolean;
  readonly isCompared: boolean;
  readonly sets: readonly NamedSet[];
}) {
  const { name, isControl, isCompared, sets } = props;
  const [picked, pick] = useState<string>();
  const preset = isControl ? undefined : sets[0]?.version;
  return (
    <fieldset class="row">
      <legend>
        Variant {name}
        {isControl && isCompared ? ', which the others are compared with' : ''}
      </legend>
      <Choice
        title="Mask set"
        name={`mask_set_${name}`}
        value={picked ?? preset ?? DENSE_VARIANT}
        options={[
          [DENSE_VARIANT, 'dense'],
          ...sets.map(({ version, name: of }) => [version, `${of} ${shortVersion(version)}`] as const),
        ]}
        onPick={pick}
      />
      {isCompared && (
        <label>
          Weight
          <input name={`weight_${name}`} type="number" min={0.001} step="any" defaultValue="1" required />
        </label>
      )}
    </fieldset>
  );
}

type NamedSet = { readonly version: string; readonly name: string };

/** The tenant's own sets, and the default set if it is in use. */
const withInUse = (
  own: readonly NamedSet[],
  inUse: { readonly version: string } | null,
): readonly NamedSet[] =>
  inUse === null || own.some(({ version }) => version === inUse.version)
    ? own
    : [...own, { version: inUse.version, name: 'in use now' }];

function Share(props: {
  readonly name: string;
  readonly title: string;
  readonly preset: string;
  readonly min: number;
}) {
  const { name, title, preset, min } = props;
  return (
    <label>
      {title}
      <input name={name} type="number" min={min} max={20} step="any" defaultValue={preset} required />
    </label>
  );
}

/** Only what compares variants has weights, a sticky unit and a significance level. */
function bodyOf(form: FormData, tenant: string, variants: number): object {
  const text = (name: string) => form.get(name)?.toString();
  const share = (name: string) => Number(text(name)) / 100;
  return {
    id: text('id'),
    tenant,
    description: text('description') ?? '',
    ...scopeOf(form),
    variants: VARIANT_NAMES.slice(0, variants).map((name) => ({
      name,
      mask_set: text(`mask_set_${name}`),
      weight: Number(text(`weight_${name}`) ?? 1),
    })),
    shadow_share: share('shadow_share'),
    ...(variants > 1 ? { sticky: text('sticky'), alpha: share('alpha') } : {}),
  };
}

/* An experiment's scope: its form fields and their values. */

/** One or several, with commas. */
const listOf = (one: string): string => `\\s*${one}(\\s*,\\s*${one})*\\s*`;

const PLACES = [
  {
    name: 'continents',
    title: 'Continents, like EU, NA',
    pattern: listOf('[A-Za-z]{2}'),
    scope: (continent: string): PlaceScope => ({ continent }),
  },
  {
    name: 'countries',
    title: 'Countries, like DE, FR',
    pattern: listOf('[A-Za-z0-9]{2}'),
    scope: (country: string): PlaceScope => ({ country }),
  },
  {
    name: 'colos',
    title: 'Data centres, like FRA, CDG',
    pattern: listOf('[A-Za-z]{3,4}'),
    scope: (colo: string): PlaceScope => ({ colo }),
  },
] as const;

/** `isShared`: it belongs to no tenant, so it may name some. */
function ScopeFields({ isShared }: { readonly isShared: boolean }) {
  return (
    <>
      <fieldset class="pairs">
        <legend>Regions; a request matches any of these (all empty: everywhere)</legend>
        {PLACES.map(({ name, title, pattern }) => (
          <label key={name}>
            {title}
            <input name={name} pattern={pattern} />
          </label>
        ))}
      </fieldset>
      {isShared && <TenantBoxes title="Tenants" none="none selected: all" name="tenants" />}
      <ModelBoxes picked={[]} />
      <div class="pairs">
        <TimeField name="starts_at" title="Begins (empty: when it is started)" />
        <TimeField name="ends_at" title="Ends (empty: when it is stopped)" />
      </div>
    </>
  );
}

/** Fields that were left empty are not in the form. */
function scopeOf(form: FormData): object {
  return {
    regions: PLACES.flatMap(({ name, scope }) =>
      itemsIn(form, name).map((code) => scope(code.toUpperCase())),
    ),
    tenants: form.getAll('tenants'),
    models: form.getAll('models'),
    ...timeIn(form, 'starts_at'),
    ...timeIn(form, 'ends_at'),
  };
}
