/** Tenants: what their keys may do, how much, and what of it is used right now. */
import { useState } from 'preact/hooks';
import { budgetUseSchema, listSchema, type Tenant, tenantSchema } from '../../../shared/admin.ts';
import { admin } from '../api.ts';
import { FormDialog } from '../components/form-dialog.tsx';
import { Loaded, Notice } from '../components/notice.tsx';
import { Table } from '../components/table.tsx';
import { useScope } from '../context.ts';
import { number, percent, when } from '../format.ts';
import { changesOf, newTenantOf, policyName, TenantFields } from '../tenants/fields.tsx';
import { useLoad } from '../use-load.ts';

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
          cell: ({ sparsity_max: most }) => (most === null ? '–' : percent(most)),
          isNumber: true,
        },
        { title: 'Requests', cell: (tenant) => limits(tenant.requests_per_minute, tenant.requests_per_day) },
        { title: 'Tokens', cell: (tenant) => limits(tenant.tokens_per_minute, tenant.tokens_per_day) },
        { title: 'Since', cell: ({ created_at }) => when(created_at) },
        {
          title: 'Change',
          cell: (tenant) => (
            <>
              <button type="button" class="small outline" onClick={() => props.onEdit(tenant)}>
                Edit <span class="hidden">{tenant.id}</span>
              </button>{' '}
              <button type="button" class="small outline" onClick={() => props.onShow(tenant.id)}>
                Budget <span class="hidden">of {tenant.id}</span>
              </button>
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
