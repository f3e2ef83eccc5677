/** Single requests, each with its routing decision and its mask. */

import {
  REQUEST_OUTCOMES,
  REQUEST_SORTS,
  type RequestDetail,
  requestDetailSchema,
  type SeenRequest,
  seenRequestSchema,
} from '../../../shared/admin/requests-wire.ts';
import type { MaskSet } from '../../../shared/mask/mask-set.ts';
import { admin, noneIfNotFound } from '../api.ts';
import { Choice, RowButton, startOf_ms, useRange, useSearch } from '../components/controls.tsx';
import { Detail, Loaded } from '../components/dialog.tsx';
import { MaskStrip } from '../components/mask-heat-map.tsx';
import {
  type Column,
  type FactList,
  Facts,
  ListTable,
  LongText,
  type Sorting,
  Table,
  When,
} from '../components/table.tsx';
import { loadMaskSet, useAddress, useAddressOf, useList, useLoad, useScope } from '../hooks.ts';
import { experimentName, number, percent, shortVersion, when, whenExactly } from '../look.ts';

const REFRESH_ms = 10_000;

const OUTCOME_NAMES: Record<(typeof REQUEST_OUTCOMES)[number], string> = {
  all: 'all',
  failed: 'failed, refused or cancelled',
  dense: 'fell back to dense',
  rated: 'rated',
};

const SORT_TITLES: Partial<Record<string, (typeof REQUEST_SORTS)[number]>> = {
  'Total, ms': 'total_ms',
  'First token, ms': 'ttft_ms',
  Tokens: 'tokens',
};

export function Requests() {
  const { tenant, isGlobal } = useScope();
  const { range, picker } = useRange();
  const { q, search } = useSearch('Find by x-request-id or completion id');
  const [outcome, setOutcome] = useAddressOf('outcome', REQUEST_OUTCOMES, 'all');
  const [sort, setSort] = useAddressOf('sort', REQUEST_SORTS, 'created_at');
  const [shown, show] = useAddress('request', '');
  const list = useList(
    seenRequestSchema,
    '/requests',
    { tenant: tenant || undefined, outcome, sort, q },
    {
      every_ms: REFRESH_ms,
      // A search by id finds requests of any age.
      from: {
        name: range.name,
        at: () => (q === undefined ? new Date(startOf_ms(range)).toISOString() : undefined),
      },
    },
  );
  const sortedBy = Object.entries(SORT_TITLES).find(([, name]) => name === sort)?.[0];
  const onSort = (by: Sorting | undefined) =>
    setSort(by?.isFalling === true ? (SORT_TITLES[by.title] ?? 'created_at') : 'created_at');
  return (
    <>
      <div class="row">
        {picker}
        <Choice
          title="Requests"
          value={outcome}
          options={REQUEST_OUTCOMES.map((name) => [name, OUTCOME_NAMES[name]])}
          onPick={setOutcome}
        />
      </div>
      {shown !== '' && <OneRequest key={shown} id={shown} onClose={() => show('')} />}
      <ListTable
        caption="Requests, kept for seven days"
        list={list}
        empty="No requests in this time."
        search={search}
        sorted={{ by: sortedBy === undefined ? undefined : { title: sortedBy, isFalling: true }, onSort }}
        rowKey={({ id }) => id}
        columns={columnsOf(isGlobal && tenant === '', show)}
      />
    </>
  );
}

/** `ofMany`: the requests are of several tenants. */
const columnsOf = (ofMany: boolean, show: (id: string) => void): Column<SeenRequest>[] => [
  { title: 'When', cell: ({ created_at }) => <When at={created_at} /> },
  ...(ofMany ? [{ title: 'Tenant', cell: ({ tenant }: SeenRequest) => tenant }] : []),
  { title: 'Model', cell: ({ model }) => model },
  { title: 'Cluster', cell: ({ cluster }) => cluster ?? '–', isNumber: true },
  { title: 'Mask', cell: ({ mask }) => <code title={mask}>{mask.slice(0, 10)}</code> },
  {
    title: 'Tokens',
    cell: ({ prompt_tokens, completion_tokens }) => `${number(prompt_tokens)} + ${number(completion_tokens)}`,
    sort: ({ prompt_tokens, completion_tokens }) => prompt_tokens + completion_tokens,
    isNumber: true,
  },
  {
    title: 'First token, ms',
    cell: ({ ttft_ms }) => number(ttft_ms),
    sort: ({ ttft_ms }) => ttft_ms,
    isNumber: true,
  },
  { title: 'ms/token', cell: ({ tpot_ms }) => number(tpot_ms, 1), isNumber: true },
  {
    title: 'Total, ms',
    cell: ({ total_ms }) => number(total_ms),
    sort: ({ total_ms }) => total_ms,
    isNumber: true,
  },
  {
    title: 'Status',
    cell: ({ status, error_code }) => `${status}${error_code === null ? '' : ` ${error_code}`}`,
  },
  { title: 'Rating', cell: ratingOf },
  { title: 'From', cell: ({ source }) => source },
  {
    title: 'Decision',
    isActions: true,
    cell: ({ id, request_id }) => (
      <RowButton title="Open" reads about={request_id ?? id} onClick={() => show(id)} />
    ),
  },
];

const ratingOf = ({ rating }: SeenRequest): string =>
  rating === null ? '–' : rating > 0 ? 'good' : rating < 0 ? 'bad' : 'divided';

/* One request: what was decided, and why. */

function OneRequest({ id, onClose }: { readonly id: string; readonly onClose: () => void }) {
  const found = useLoad(['request', id], (signal) => loadDetail(id, signal));
  return (
    <Detail title={`Request ${id}`} onClose={onClose}>
      <Loaded load={found}>{({ request, set }) => <Decision request={request} set={set} />}</Loaded>
    </Detail>
  );
}

async function loadDetail(id: string, signal: AbortSignal) {
  const request = await admin(requestDetailSchema, `/requests/${id}`, { signal });
  const { version, tenant } = request;
  const set = version === null ? null : await loadMaskSet(version, tenant, signal).catch(noneIfNotFound);
  return { request, set };
}

function Decision({ request, set }: { readonly request: RequestDetail; readonly set: MaskSet | null }) {
  const cluster = request.cluster === null ? undefined : set?.clusters[request.cluster];
  // The mask may be of another cluster, if the nearest cluster's mask exceeds the tenant's limit.
  const drawn = set?.clusters.find(({ mask }) => mask === request.mask);
  return (
    <>
      <p>{whyOf(request, cluster?.label)}</p>
      {set !== null && (drawn !== undefined || request.mask === 'dense') && (
        <MaskStrip blockCount={set.model.blockCount} bits={drawn?.bits ?? null} />
      )}
      <Facts facts={factsOf(request, set)} />
      {request.ratings.length > 0 && (
        <Table
          caption="Ratings"
          rows={request.ratings}
          rowKey={({ created_at, comment }) => `${created_at} ${comment}`}
          columns={[
            { title: 'When', cell: ({ created_at }) => <When at={created_at} /> },
            { title: 'Rating', cell: ({ rating }) => (rating > 0 ? 'good' : 'bad') },
            { title: 'Comment', cell: ({ comment }) => <span class="prose">{comment ?? '–'}</span> },
          ]}
        />
      )}
      {request.texts === null ? (
        <p>
          <small>
            The prompt and the answer are not kept. The tenant’s form sets for how many days texts are kept.
          </small>
        </p>
      ) : (
        <>
          <h3>Prompt</h3>
          <LongText label="Prompt" text={request.texts.prompt} />
          <h3>Answer</h3>
          <LongText label="Answer" text={request.texts.answer} />
          <small>Kept until {when(request.texts.expires_at)}.</small>
        </>
      )}
    </>
  );
}

function whyOf({ cluster, similarity, fallback, mask }: RequestDetail, label: string | undefined): string {
  const near =
    cluster === null ? '' : `Cluster ${cluster}${label === undefined ? '' : ` (${label})`} is the nearest`;
  const cosine = similarity === null ? '' : `, at a cosine of ${number(similarity, 3)}`;
  if (fallback !== null) {
    const nearest = near === '' ? '' : ` ${near}${cosine}.`;
    return `It ran dense: ${fallback.replaceAll('_', ' ')}.${nearest}`;
  }
  if (near !== '') return `${near}${cosine}: it got that cluster’s mask.`;
  return mask === 'dense' ? 'It ran dense.' : 'The client named the mask itself.';
}

const factsOf = (request: RequestDetail, set: MaskSet | null): FactList => [
  ['x-request-id', request.request_id ?? '–'],
  ['When', whenExactly(request.created_at)],
  ['Tenant and key', `${request.tenant}, ${request.key_id}`],
  ['From', request.source],
  ['Model', request.model],
  ['Mask set', request.version === null ? 'none' : `${set?.name ?? ''} ${shortVersion(request.version)}`],
  ['Mask', request.mask],
  ['Blocks skipped', percent(request.sparsity)],
  ['Status', `${request.status}${request.error_code === null ? '' : ` ${request.error_code}`}`],
  ['Tokens', `${number(request.prompt_tokens)} in, ${number(request.completion_tokens)} out`],
  ['First token', `${number(request.ttft_ms)} ms`],
  ['ms/token', number(request.tpot_ms, 1)],
  ['Total', `${number(request.total_ms)} ms`],
  ['Backend', request.backend ?? 'none answered'],
  ['Experiment', experimentName(request.experiment, request.variant)],
  ['Region', request.region],
  ['Agreement with dense', request.agreement === null ? 'not compared' : percent(request.agreement)],
];
