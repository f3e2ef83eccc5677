/** Tenants: who sends requests, and which text of theirs is routed by. */
import { useState } from 'preact/hooks';
import { listSchema, tenantSchema } from '../../../shared/admin.ts';
import { ROUTING_POLICIES } from '../../../shared/embedding/route-text.ts';
import { admin } from '../api.ts';
import { FormDialog } from '../components/form-dialog.tsx';
import { Loaded } from '../components/notice.tsx';
import { Table } from '../components/table.tsx';
import { useScope } from '../context.ts';
import { when } from '../format.ts';
import { useLoad } from '../use-load.ts';

export function Tenants() {
  const { isGlobal } = useScope();
  const [isAdding, setAdding] = useState(false);
  const tenants = useLoad((signal) => admin(listSchema(tenantSchema), '/tenants', { signal }), []);
  return (
    <>
      {isGlobal && (
        <button type="button" onClick={() => setAdding(true)}>
          New tenant
        </button>
      )}
      <Loaded load={tenants}>
        {({ data }) => (
          <Table
            caption="Tenants"
            rows={data}
            rowKey={({ id }) => id}
            columns={[
              { title: 'Id', cell: (tenant) => <code>{tenant.id}</code> },
              { title: 'Name', cell: (tenant) => tenant.name },
              { title: 'Routed by', cell: (tenant) => policyName(tenant.routing_policy) },
              { title: 'Since', cell: (tenant) => when(tenant.created_at) },
            ]}
          />
        )}
      </Loaded>
      {isAdding && (
        <FormDialog
          title="New tenant"
          action="Create"
          onClose={() => setAdding(false)}
          onSubmit={async (form) => {
            await admin(tenantSchema, '/tenants', { method: 'POST', body: Object.fromEntries(form) });
            setAdding(false);
            tenants.reload();
          }}
        >
          <label>
            Id
            <input
              name="id"
              required
              pattern="[a-z0-9][a-z0-9\-]{0,62}"
              title="lower-case letters, digits and dashes"
            />
          </label>
          <label>
            Name
            <input name="name" required maxLength={200} />
          </label>
          <label>
            Routed by
            <select name="routing_policy">
              {ROUTING_POLICIES.map((policy) => (
                <option key={policy} value={policy}>
                  {policyName(policy)}
                </option>
              ))}
            </select>
          </label>
        </FormDialog>
      )}
    </>
  );
}

const policyName = (policy: (typeof ROUTING_POLICIES)[number]): string => policy.replaceAll('_', ' ');
