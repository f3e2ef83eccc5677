/** What a job learns, as a form: its data is uploaded first, then the backend is asked. */
import { type CreateEdgeJob, DATA_NAME_PATTERN, uploadedDataSchema } from '../../../shared/admin/job-wire.ts';
import { admin, query } from '../api.ts';

/**
 * Neither nothing nor all is a sparsity. A field's bounds are themselves allowed, so they are half a block of the
 * largest model (1,024 blocks) away from both.
 */
const SPARSITY_percent = { min: 0.05, max: 99.95 };

export const JobFields = () => (
  <>
    <label>
      Prompts, as JSONL; a file’s name is the kind of its rows
      <input name="files" type="file" multiple accept=".jsonl,.ndjson,application/x-ndjson" />
    </label>
    <label>
      Or a file in the folder that the backend opens to jobs
      <input name="path" maxLength={500} placeholder="support.jsonl" />
    </label>
    <div class="pairs">
      <label>
        Clusters (empty: as many as stand apart)
        <input name="clusters" type="number" min={1} max={256} />
      </label>
      <label>
        Blocks skipped, %
        <input
          name="sparsity"
          type="number"
          min={SPARSITY_percent.min}
          max={SPARSITY_percent.max}
          step="any"
          defaultValue="12.5"
          required
        />
      </label>
      <label>
        Counted
        <select name="cost">
          <option value="blocks">in blocks</option>
          <option value="time">in measured time</option>
        </select>
      </label>
      <label>
        Max rows (empty: all)
        <input name="rows" type="number" min={1} max={10_000_000} />
      </label>
    </div>
    <label>
      Name of the mask set
      <input
        name="name"
        required
        defaultValue="learned"
        pattern="[A-Za-z0-9][A-Za-z0-9_\-]{0,63}"
        title="letters, digits, _ and -"
      />
    </label>
  </>
);

/** The job that the form describes. `jobs`: the path of the backend's jobs, where its files are uploaded. */
export async function jobIn(form: FormData, jobs: string): Promise<object> {
  const uploads: CreateEdgeJob['data'] = [];
  for (const file of form.getAll('files')) {
    if (file instanceof File && file.size > 0) uploads.push({ upload: await upload(jobs, file) });
  }
  const path = form.get('path');
  const clusters = form.get('clusters');
  const rows = form.get('rows');
  return {
    kind: 'learn',
    data: [...uploads, ...(path === null ? [] : [{ path }])],
    clusters: clusters === null ? 'auto' : Number(clusters),
    sparsity: Number(form.get('sparsity')) / 100,
    cost: form.get('cost'),
    name: form.get('name'),
    ...(rows === null ? {} : { rows: Number(rows) }),
  };
}

/** The id of the data. */
async function upload(jobs: string, file: File): Promise<string> {
  const plain = file.name.replace(/\.[^.]*$/, '').replaceAll(/[^A-Za-z0-9_-]/g, '-');
  const name = DATA_NAME_PATTERN.test(plain) ? plain : 'data';
  const path = `${jobs}/data${query({ name })}`;
  return (await admin(uploadedDataSchema, path, { method: 'POST', file })).id;
}
