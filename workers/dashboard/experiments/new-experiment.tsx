/** The form for a new experiment: a draft, so that it can be looked at before it is started. */
import { useState } from 'preact/hooks';
import { listSchema, maskSetSummarySchema } from '../../../shared/admin.ts';
import { DENSE_VARIANT, experimentSchema } from '../../../shared/admin-experiments.ts';
import { STICKY_KINDS } from '../../../shared/sticky-key.ts';
import { admin, query } from '../api.ts';
import { FormDialog } from '../components/form-dialog.tsx';
import { Loaded } from '../components/notice.tsx';
import { useScope } from '../context.ts';
import { shortVersion } from '../format.ts';
import { publicationInUse } from '../live-set.ts';
import { useLoad } from '../use-load.ts';
import { ScopeFields, scopeOf } from './scope-fields.tsx';

const VARIANT_NAMES = ['A', 'B', 'C', 'D', 'E', 'F'];

export function NewExperiment({ onClose }: { readonly onClose: () => void }) {
  const { tenant } = useScope();
  const [variants, setVariants] = useState(2);
  const sets = useLoad((signal) => loadSets(tenant, signal), [tenant]);
  const submit = async (form: FormData) => {
    await admin(experimentSchema, '/experiments', { method: 'POST', body: bodyOf(form, tenant, variants) });
    onClose();
  };
  return (
    <FormDialog title="New experiment" action="Create the draft" onClose={onClose} onSubmit={submit}>
      <label>
        Id
        <input name="id" required maxLength={63} />
      </label>
      <label>
        What it is to find out
        <input name="description" maxLength={2000} />
      </label>
      <Loaded load={sets}>
        {(found) => (
          <>
            {VARIANT_NAMES.slice(0, variants).map((name, index) => (
              <fieldset key={name} class="row">
                <legend>
                  Variant {name}
                  {index === 0 ? ', which the others are compared with' : ''}
                </legend>
                <label>
                  Mask set
                  <select name={`mask_set_${name}`}>
                    <option value={DENSE_VARIANT}>dense</option>
                    {found.map(({ version, name: setName }) => (
                      <option key={version} value={version} selected={index > 0}>
                        {setName} {shortVersion(version)}
                      </option>
                    ))}
                  </select>
                </label>
                <label>
                  Weight
                  <input
                    name={`weight_${name}`}
                    type="number"
                    min={0.001}
                    step="any"
                    defaultValue="1"
                    required
                  />
                </label>
              </fieldset>
            ))}
          </>
        )}
      </Loaded>
      {variants < VARIANT_NAMES.length && (
        <button type="button" class="small outline" onClick={() => setVariants(variants + 1)}>
          One more variant
        </button>
      )}
      <label>
        The same variant for the same
        <select name="sticky">
          {STICKY_KINDS.map((kind) => (
            <option key={kind} value={kind}>
              {kind.replaceAll('_', ' ')}
            </option>
          ))}
        </select>
      </label>
      <ScopeFields isShared={tenant === ''} />
      <div class="pairs">
        <Share name="shadow_share" title="Requests compared with dense, %" preset="1" min={0} />
        <Share name="alpha" title="Risk of a false claim, %" preset="5" min={0.1} />
      </div>
    </FormDialog>
  );
}

type NamedSet = { readonly version: string; readonly name: string };

/** The tenant's own sets, and the default one where its requests use that. */
async function loadSets(tenant: string, signal: AbortSignal): Promise<NamedSet[]> {
  const path = `/mask-sets${query({ tenant })}`;
  const [{ data }, inUse] = await Promise.all([
    admin(listSchema(maskSetSummarySchema), path, { signal }),
    tenant === '' ? null : publicationInUse(tenant, signal),
  ]);
  if (inUse === null || data.some(({ version }) => version === inUse.version)) return data;
  return [...data, { version: inUse.version, name: 'in use now' }];
}

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

function bodyOf(form: FormData, tenant: string, variants: number): object {
  const text = (name: string) => form.get(name)?.toString();
  const share = (name: string) => Number(text(name)) / 100;
  return {
    id: text('id'),
    tenant,
    description: text('description') ?? '',
    sticky: text('sticky'),
    ...scopeOf(form),
    variants: VARIANT_NAMES.slice(0, variants).map((name) => ({
      name,
      mask_set: text(`mask_set_${name}`),
      weight: Number(text(`weight_${name}`)),
    })),
    shadow_share: share('shadow_share'),
    alpha: share('alpha'),
  };
}
