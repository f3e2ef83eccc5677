/** The fields of a tenant's form, and what the edge is told of them. */
import type { Tenant } from '../../../shared/admin.ts';
import { ROUTING_POLICIES } from '../../../shared/embedding/route-text.ts';

export const policyName = (policy: Tenant['routing_policy']): string => policy.replaceAll('_', ' ');

/** Empty fields mean no limit. Shares are asked for in percent. */
const LIMITS = [
  { name: 'requests_per_minute', title: 'Requests a minute', scale: 1 },
  { name: 'requests_per_day', title: 'Requests a day', scale: 1 },
  { name: 'tokens_per_minute', title: 'Tokens a minute', scale: 1 },
  { name: 'tokens_per_day', title: 'Tokens a day', scale: 1 },
  { name: 'sparsity_max', title: 'Blocks out at most, %', scale: 100 },
  { name: 'agreement_min', title: 'Agreement with dense at least, %', scale: 100 },
] as const;

/** A tenant's own administrator sees the name and the policy only: the edge refuses the rest. */
export function TenantFields({
  tenant,
  isGlobal,
}: {
  readonly tenant: Tenant | undefined;
  readonly isGlobal: boolean;
}) {
  return (
    <>
      {tenant === undefined && (
        <label>
          Id
          <input
            name="id"
            required
            pattern="[a-z0-9][a-z0-9\-]{0,62}"
            title="lower-case letters, digits and dashes"
          />
        </label>
      )}
      <label>
        Name
        <input name="name" required maxLength={200} defaultValue={tenant?.name} />
      </label>
      <label>
        Routed by
        <select name="routing_policy">
          {ROUTING_POLICIES.map((policy) => (
            <option key={policy} value={policy} selected={policy === tenant?.routing_policy}>
              {policyName(policy)}
            </option>
          ))}
        </select>
      </label>
      {isGlobal && (
        <>
          <label>
            <input name="enabled" type="checkbox" defaultChecked={tenant?.enabled ?? true} />
            Enabled
          </label>
          <label>
            Models, with commas (empty: every one)
            <input name="models" defaultValue={tenant?.models?.join(', ')} />
          </label>
          <div class="pairs">
            {LIMITS.map(({ name, title, scale }) => (
              <label key={name}>
                {title}
                <input
                  name={name}
                  type="number"
                  min={scale === 1 ? 1 : 0}
                  max={scale === 1 ? 1e12 : 100}
                  step={scale === 1 ? 1 : 'any'}
                  defaultValue={scaled(tenant?.[name], scale)}
                />
              </label>
            ))}
          </div>
        </>
      )}
    </>
  );
}

const scaled = (value: number | null | undefined, scale: number): string | undefined =>
  value == null ? undefined : String(Number((value * scale).toFixed(6)));

export const newTenantOf = (form: FormData): object => ({
  id: form.get('id'),
  ...ownFields(form),
  ...limitFields(form),
});

/** Only what differs, so that two people who change different things do not undo each other's. */
export function changesOf(form: FormData, tenant: Tenant, isGlobal: boolean): object {
  const wanted = { ...ownFields(form), ...(isGlobal ? limitFields(form) : {}) };
  return Object.fromEntries(
    Object.entries(wanted).filter(
      ([name, value]) => JSON.stringify(value) !== JSON.stringify(tenant[name as keyof Tenant]),
    ),
  );
}

const ownFields = (form: FormData) => ({
  name: form.get('name'),
  routing_policy: form.get('routing_policy'),
});

function limitFields(form: FormData): object {
  const models = form.get('models')?.toString().split(',') ?? [];
  const named = models.map((model) => model.trim()).filter((model) => model !== '');
  return {
    enabled: form.get('enabled') !== null,
    models: named.length === 0 ? null : named,
    ...Object.fromEntries(
      LIMITS.map(({ name, scale }) => {
        const text = form.get(name);
        return [name, text === null ? null : Number(text) / scale];
      }),
    ),
  };
}
