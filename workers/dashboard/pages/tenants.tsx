/** Tenants: permissions, limits, and present use. */

import { useState } from 'preact/hooks';
import {
  budgetUseSchema,
  listSchema,
  TEXTS_KEPT_DAYS_MAX,
  type Tenant,
  tenantSchema,
} from '../../../shared/admin/admin-wire.ts';
import { ROUTING_POLICIES } from '../../../shared/embedding/encoder.ts';
import { admin } from '../api.ts';
import {
  IdField,
  ModelBoxes,
  NameField,
  RowButton,
  type SearchProps,
  useSearch,
} from '../components/controls.tsx';
import { Detail, FormDialog, Loaded, Notice, Unreadable } from '../components/dialog.tsx';
import { ListTable, Table } from '../components/table.tsx';
import { type List, useAddress, useAnswer, useList, useScope } from '../hooks.ts';
import { number, percent, unreadableHere, when } from '../look.ts';

type Open = { readonly what: 'add' } | { readonly what: 'edit'; readonly tenant: Tenant };

export function Tenants() {
  const { isGlobal, mayChange } = useScope();
  const [open, setOpen] = useState<Open>();
  const [shown, setShown] = useAddress('budget', '');
  const { q, search } = useSearch('Search tenants: an id or a name');
  const [changed, setChanged] = useState<Tenant>();
  const tenants = useList(tenantSchema, '/tenants', { q });
  const close = () => setOpen(undefined);
  return (
    <>
      {isGlobal && mayChange && (
        <button type="button" onClick={() => setOpen({ what: 'add' })}>
          New tenant
        </button>
      )}
      {changed?.warnings?.map(({ code, message }) => (
        <Notice key={code} kind="warning">
          {changed.id}: {message}
        </Notice>
      ))}
      {shown !== '' && (
        <Detail key={shown} title={`Budget of ${shown}`} onClose={() => setShown('')}>
          <Budget id={shown} />
        </Detail>
      )}
      <TenantTable
        tenants={tenants}
        search={search}
        onEdit={(tenant) => setOpen({ what: 'edit', tenant })}
        onShow={setShown}
      />
      {open?.what === 'add' && (
        <FormDialog
          title="New tenant"
          action="Create"
          onClose={close}
          onSubmit={async (form) => {
            await admin(tenantSchema, '/tenants', { method: 'POST', body: newTenantOf(form) });
            close();
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
            close();
          }}
        >
          <TenantFields tenant={open.tenant} isGlobal={isGlobal} />
        </FormDialog>
      )}
    </>
  );
}

function TenantTable(props: {
  readonly tenants: List<Tenant>;
  readonly search: SearchProps;
  readonly onEdit: (tenant: Tenant) => void;
  readonly onShow: (id: string) => void;
}) {
  return (
    <ListTable
      caption="Tenants"
      list={props.tenants}
      search={props.search}
      rowKey={({ id }) => id}
      columns={[
        { title: 'Id', cell: ({ id }) => <code>{id}</code>, sort: ({ id }) => id },
        { title: 'Name', cell: ({ name }) => name, sort: ({ name }) => name },
        {
          title: 'State',
          cell: stateOf,
          sort: stateOf,
        },
        { title: 'Routing policy', cell: policyOf },
        { title: 'Models', cell: ({ models }) => models?.join(', ') ?? 'all' },
        {
          title: 'Max blocks skipped',
          cell: ({ sparsity_max }) => percent(sparsity_max),
          isNumber: true,
        },
        { title: 'Requests', cell: (tenant) => limits(tenant.requests_per_minute, tenant.requests_per_day) },
        { title: 'Tokens', cell: (tenant) => limits(tenant.tokens_per_minute, tenant.tokens_per_day) },
        {
          title: 'Texts kept',
          cell: ({ texts_kept_days: days }) => (days === null ? 'no' : `${days} days`),
        },
        { title: 'Since', cell: ({ created_at }) => when(created_at), sort: ({ created_at }) => created_at },
        {
          title: 'Change',
          isActions: true,
          cell: (tenant) => (
            <>
              <RowButton title="Edit" about={tenant.id} onClick={() => props.onEdit(tenant)} />{' '}
              <RowButton
                title="Budget"
                reads
                about={`of ${tenant.id}`}
                onClick={() => props.onShow(tenant.id)}
              />
            </>
          ),
        },
      ]}
    />
  );
}

/** Requests of a tenant whose limits cannot be read are refused, whatever its state. */
const stateOf = ({ enabled, unreadable }: Tenant): string =>
  (enabled ? 'enabled' : 'disabled') + unreadableHere(unreadable);

function limits(perMinute: number | null, perDay: number | null): string {
  const parts = [
    ...(perMinute === null ? [] : [`${number(perMinute)}/min`]),
    ...(perDay === null ? [] : [`${number(perDay)}/day`]),
  ];
  return parts.join(', ') || 'no limit';
}

const BUDGET_REFRESH_ms = 5_000;

function Budget({ id }: { readonly id: string }) {
  const budget = useAnswer(listSchema(budgetUseSchema), `/tenants/${id}/budget`, BUDGET_REFRESH_ms);
  return (
    <Loaded load={budget}>
      {({ data }) => (
        <Table
          caption="Limits and usage"
          empty={`${id} has no limits.`}
          rows={data}
          rowKey={({ unit, window }) => `${unit} ${window}`}
          columns={[
            { title: 'Limited', cell: ({ unit, window }) => `${unit} a ${window}` },
            { title: 'Limit', cell: ({ limit }) => number(limit), isNumber: true },
            { title: 'Used and reserved', cell: ({ used }) => number(used), isNumber: true },
            { title: 'Share', cell: ({ used, limit }) => percent(used / limit), isNumber: true },
            { title: 'Resets at', cell: ({ resets_at }) => when(resets_at) },
          ]}
        />
      )}
    </Loaded>
  );
}

/* A tenant's form: its fields and their values. */

const POLICY_NAMES: Record<Tenant['routing_policy'], string> = {
  first_user: 'first user message',
  last_user: 'last user message before an answer',
  conversation: 'all messages before an answer',
};

const policyOf = ({ routing_policy, unknown_policy }: Tenant): string =>
  POLICY_NAMES[routing_policy] +
  (unknown_policy === undefined ? '' : `, as this version cannot read “${unknown_policy}”`);

/** Empty fields mean no limit. Shares are asked for in percent. */
const LIMITS = [
  { name: 'requests_per_minute', title: 'Requests a minute', scale: 1 },
  { name: 'requests_per_day', title: 'Requests a day', scale: 1 },
  { name: 'tokens_per_minute', title: 'Tokens a minute', scale: 1 },
  { name: 'tokens_per_day', title: 'Tokens a day', scale: 1 },
  { name: 'sparsity_max', title: 'Max blocks skipped, %', scale: 100 },
  { name: 'agreement_min', title: 'Min agreement with dense, %', scale: 100 },
] as const;

/** A tenant's own administrator sees only the fields that it may change; the edge refuses others. */
function TenantFields({
  tenant,
  isGlobal,
}: {
  readonly tenant: Tenant | undefined;
  readonly isGlobal: boolean;
}) {
  return (
    <>
      {tenant?.unreadable !== undefined && isGlobal && (
        <Unreadable
          what={[tenant.unreadable]}
          advice="Requests of this tenant are refused. Saving replaces its limits with those that you see here."
        />
      )}
      {tenant === undefined && <IdField />}
      <NameField preset={tenant?.name} />
      <label>
        Routing policy
        <select name="routing_policy">
          {tenant?.unknown_policy !== undefined && (
            <option value="" selected>
              {tenant.unknown_policy}, which this version cannot read
            </option>
          )}
          {ROUTING_POLICIES.map((policy) => (
            <option key={policy} value={policy} selected={policy === pickedPolicy(tenant)}>
              {POLICY_NAMES[policy]}
            </option>
          ))}
        </select>
      </label>
      <label>
        Days to keep prompts and answers, to be read beside their request (empty: never kept)
        <input
          name="texts_kept_days"
          type="number"
          min={1}
          max={TEXTS_KEPT_DAYS_MAX}
          defaultValue={tenant?.texts_kept_days == null ? undefined : String(tenant.texts_kept_days)}
        />
      </label>
      {isGlobal && (
        <>
          <label>
            <input name="enabled" type="checkbox" defaultChecked={tenant?.enabled ?? true} />
            Enabled
          </label>
          <ModelBoxes picked={tenant?.models ?? []} />
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

/** Undefined if this version cannot read the policy, which then stays unless somebody picks another. */
const pickedPolicy = (tenant: Tenant | undefined): string | undefined =>
  tenant?.unknown_policy === undefined ? tenant?.routing_policy : undefined;

const scaled = (value: number | null | undefined, scale: number): string | undefined =>
  value == null ? undefined : String(Number((value * scale).toFixed(6)));

const newTenantOf = (form: FormData): object => ({
  id: form.get('id'),
  ...ownFields(form),
  ...limitFields(form),
});

/**
 * Only the fields that the person changed, so that two people who change different fields do not undo each other. The
 * form shows models in its own order, and rounded shares. Limits that cannot be read are not shown, so all are replaced.
 */
function changesOf(form: FormData, tenant: Tenant, isGlobal: boolean): object {
  const wanted = { ...ownFields(form), ...(isGlobal ? limitFields(form) : {}) };
  const shown = {
    ...tenant,
    routing_policy: pickedPolicy(tenant),
    ...Object.fromEntries(LIMITS.map((limit) => [limit.name, shownOf(tenant, limit)])),
  };
  if (tenant.unreadable !== undefined) return wanted;
  const comparable = (value: unknown) => JSON.stringify(Array.isArray(value) ? [...value].sort() : value);
  return Object.fromEntries(
    Object.entries(wanted).filter(
      ([name, value]) => comparable(value) !== comparable(shown[name as keyof Tenant]),
    ),
  );
}

const shownOf = (tenant: Tenant, { name, scale }: (typeof LIMITS)[number]): number | null =>
  limitIn(scaled(tenant[name], scale) ?? null, scale);

const limitIn = (text: FormDataEntryValue | null, scale: number): number | null =>
  text === null ? null : Number(text) / scale;

const ownFields = (form: FormData) => {
  const days = form.get('texts_kept_days');
  return {
    name: form.get('name'),
    routing_policy: form.get('routing_policy') ?? undefined,
    texts_kept_days: days === null ? null : Number(days),
  };
};

function limitFields(form: FormData): object {
  const models = form.getAll('models');
  return {
    enabled: form.get('enabled') !== null,
    models: models.length === 0 ? null : models,
    ...Object.fromEntries(LIMITS.map(({ name, scale }) => [name, limitIn(form.get(name), scale)])),
  };
}
