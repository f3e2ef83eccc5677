/** Tenants: what their keys may do, how much, and how much they use right now. */

import { useState } from 'preact/hooks';
import { budgetUseSchema, listSchema, type Tenant, tenantSchema } from '../../../shared/admin/admin-wire.ts';
import { ROUTING_POLICIES } from '../../../shared/embedding/route-text.ts';
import { admin } from '../api.ts';
import { itemsIn, RowButton } from '../components/controls.tsx';
import { FormDialog } from '../components/dialog.tsx';
import { Loaded, Notice } from '../components/notice.tsx';
import { Table } from '../components/table.tsx';
import { useLoad, useScope } from '../hooks.ts';
import { number, percent, when } from '../look.ts';

type Open = { readonly what: 'add' } | { readonly what: 'edit'; readonly tenant: Tenant };

export function Tenants() {
  const { isGlobal } = useScope();
  const [open, setOpen] = useState<Open>();
  const [shown, setShown] = useState<string>();
  const [changed, setChanged] = useState<Tenant>();
  const tenants = useLoad((signal) => admin(listSchema(tenantSchema), '/tenants', { signal }), []);
  const close = () => setOpen(undefined);
  const done = () => {
    close();
    tenants.reload();
  };
  return (
    <>
      {isGlobal && (
        <button type="button" onClick={() => setOpen({ what: 'add' })}>
          New tenant
        </button>
      )}
      {changed?.warnings?.map(({ code, message }) => (
        <Notice key={code} kind="warning">
          {changed.id}: {message}
        </Notice>
      ))}
      <Loaded load={tenants}>
        {({ data }) => (
          <>
            <List tenants={data} onEdit={(tenant) => setOpen({ what: 'edit', tenant })} onShow={setShown} />
            {data.some(({ id }) => id === shown) && <Budget key={shown} id={shown!} />}
          </>
        )}
      </Loaded>
      {open?.what === 'add' && (
        <FormDialog
          title="New tenant"
          action="Create"
          onClose={close}
          onSubmit={async (form) => {
            await admin(tenantSchema, '/tenants', { method: 'POST', body: newTenantOf(form) });
            done();
          }}
        >
          <TenantFields tenant={undefined} isGlobal />
        </FormDialog>
      )}
      {open?.what === 'edit' && (
        <FormDialog
          title={`Tenant ${open.tenant.id}`}
          action="Save"
          onClose={close}
          onSubmit={async (form) => {
            const body = changesOf(form, open.tenant, isGlobal);
            if (Object.keys(body).length > 0) {
              const path = `/tenants/${open.tenant.id}`;
              setChanged(await admin(tenantSchema, path, { method: 'PATCH', body }));
            }
            done();
          }}
        >
          <TenantFields tenant={open.tenant} isGlobal={isGlobal} />
        </FormDialog>
      )}
    </>
  );
}

function List(props: {
  readonly tenants: readonly Tenant[];
  readonly onEdit: (tenant: Tenant) => void;
  readonly onShow: (id: string) => void;
}) {
  return (
    <Table
      caption="Tenants"
      rows={props.tenants}
      rowKey={({ id }) => id}
      columns={[
        { title: 'Id', cell: ({ id }) => <code>{id}</code> },
        { title: 'Name', cell: ({ name }) => name },
        { title: 'State', cell: ({ enabled }) => (enabled ? 'enabled' : 'disabled') },
        { title: 'Routed by', cell: (tenant) => policyName(tenant.routing_policy) },
        { title: 'Models', cell: ({ models }) => models?.join(', ') ?? 'every one' },
        {
          title: 'Blocks out at most',
          cell: ({ sparsity_max }) => percent(sparsity_max),
          isNumber: true,
        },
        { title: 'Requests', cell: (tenant) => limits(tenant.requests_per_minute, tenant.requests_per_day) },
        { title: 'Tokens', cell: (tenant) => limits(tenant.tokens_per_minute, tenant.tokens_per_day) },
        { title: 'Since', cell: ({ created_at }) => when(created_at) },
        {
          title: 'Change',
          cell: (tenant) => (
            <>
              <RowButton title="Edit" about={tenant.id} onClick={() => props.onEdit(tenant)} />{' '}
              <RowButton title="Budget" about={`of ${tenant.id}`} onClick={() => props.onShow(tenant.id)} />
            </>
          ),
        },
      ]}
    />
  );
}

function limits(perMinute: number | null, perDay: number | null): string {
  const parts = [
    ...(perMinute === null ? [] : [`${number(perMinute)} a minute`]),
    ...(perDay === null ? [] : [`${number(perDay)} a day`]),
  ];
  return parts.join(', ') || 'no limit';
}

const BUDGET_REFRESH_ms = 5_000;

function Budget({ id }: { readonly id: string }) {
  const budget = useLoad(
    (signal) => admin(listSchema(budgetUseSchema), `/tenants/${id}/budget`, { signal }),
    [id],
    BUDGET_REFRESH_ms,
  );
  return (
    <Loaded load={budget}>
      {({ data }) => (
        <Table
          caption={`Budget of ${id}`}
          empty={`${id} has no limits.`}
          rows={data}
          rowKey={({ unit, window }) => `${unit} ${window}`}
          columns={[
            { title: 'What', cell: ({ unit, window }) => `${unit} a ${window}` },
            { title: 'Limit', cell: ({ limit }) => number(limit), isNumber: true },
            { title: 'Used and reserved', cell: ({ used }) => number(used), isNumber: true },
            { title: 'Share', cell: ({ used, limit }) => percent(used / limit), isNumber: true },
            { title: 'All free', cell: ({ resets_at }) => when(resets_at) },
          ]}
        />
      )}
    </Loaded>
  );
}

/* The fields of a tenant's form, and what they tell the edge. */

const policyName = (policy: Tenant['routing_policy']): string => policy.replaceAll('_', ' ');

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
function TenantFields({
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

const newTenantOf = (form: FormData): object => ({
  id: form.get('id'),
  ...ownFields(form),
  ...limitFields(form),
});

/** Only what differs, so that two people who change different things do not undo each other's. */
function changesOf(form: FormData, tenant: Tenant, isGlobal: boolean): object {
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
  const models = itemsIn(form, 'models');
  return {
    enabled: form.get('enabled') !== null,
    models: models.length === 0 ? null : models,
    ...Object.fromEntries(
      LIMITS.map(({ name, scale }) => {
        const text = form.get(name);
        return [name, text === null ? null : Number(text) / scale];
      }),
    ),
  };
}
