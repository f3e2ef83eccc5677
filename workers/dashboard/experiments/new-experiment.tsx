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
import { useLoad } from '../use-load.ts';

const VARIANT_NAMES = ['A', 'B', 'C', 'D', 'E', 'F'];

export function NewExperiment({ onClose }: { readonly onClose: () => void }) {
  const { tenant } = useScope();
  const [variants, setVariants] = useState(2);
  const sets = useLoad(
    (signal) => admin(listSchema(maskSetSummarySchema), `/mask-sets${query({ tenant })}`, { signal }),
    [tenant],
  );
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
        {({ data }) => (
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
                    {data.map((set) => (
                      <option key={set.version} value={set.version} selected={index > 0}>
                        {set.name} {shortVersion(set.version)}
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
      <label>
        Countries, with commas (empty: everywhere)
        <input name="countries" pattern="[A-Za-z0-9]{2}(\s*,\s*[A-Za-z0-9]{2})*" />
      </label>
      <label>
        Ends (empty: when it is stopped)
        <input name="ends_at" type="datetime-local" />
      </label>
    </FormDialog>
  );
}

function bodyOf(form: FormData, tenant: string, variants: number): object {
  const text = (name: string) => form.get(name)?.toString();
  const ends = text('ends_at');
  const countries = text('countries')?.split(/\s*,\s*/) ?? [];
  return {
    id: text('id'),
    tenant,
    description: text('description') ?? '',
    sticky: text('sticky'),
    regions: countries.map((country) => ({ country: country.toUpperCase() })),
    variants: VARIANT_NAMES.slice(0, variants).map((name) => ({
      name,
      mask_set: text(`mask_set_${name}`),
      weight: Number(text(`weight_${name}`)),
    })),
    ...(ends === undefined ? {} : { ends_at: new Date(ends).toISOString() }),
  };
}
