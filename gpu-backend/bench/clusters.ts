/**
 * Where prompts go: the table of kind × cluster of a mask set, for any data files (a kind is a file's name, or the
 * rows' own `kind`). What the edge embeds is embedded, and what it would pick is counted.
 *
 * Run: `node gpu-backend/bench/clusters.ts --mask-set FILE --data FILE...`. The last line is one JSON object.
 */
import { availableParallelism } from 'node:os';
import { parseArgs } from 'node:util';
import { sameEncoder } from '../../shared/mask-set.ts';
import { nearestCentroid, packCentroids } from '../../shared/route.ts';
import { maskrouteHome } from '../home.ts';
import { embedRows, informationBits, kindTable } from '../learning/data/clusters.ts';
import { openEncoder } from '../learning/data/encoders.ts';
import { readData } from '../learning/data/read-data.ts';
import { readMaskSet } from '../publication/artefact-files.ts';

const { values, positionals } = parseArgs({
  options: {
    'mask-set': { type: 'string' },
    encoder: { type: 'string', default: 'static' },
    data: { type: 'string', multiple: true, default: [] },
  },
  allowPositionals: true,
});

const set = await readMaskSet(values['mask-set'] ?? '');
const hooks = { onProgress: () => {}, log: (line: string) => console.error(line) };
const open = await openEncoder(values.encoder, {
  home: maskrouteHome(),
  threads: availableParallelism(),
  hooks,
});
if (!sameEncoder(open.encoder.spec, set.encoder)) {
  throw new Error(
    `the mask set belongs to ${JSON.stringify(set.encoder)}, not ${JSON.stringify(open.encoder.spec)}`,
  );
}
const { rows } = await readData([...values.data, ...positionals]);
const centroids = packCentroids(set.clusters.map((cluster) => cluster.centroid));
const vectors = await embedRows(rows, open.encoder);
await open.close();
const assignment = vectors.map((vector) => nearestCentroid(vector, centroids).cluster);
const kinds = kindTable(rows, assignment, centroids.clusterCount);
const shares = set.clusters.map((_, c) => kinds.reduce((sum, row) => sum + row.counts[c]!, 0) / rows.length);
console.table(Object.fromEntries(kinds.map(({ kind, counts }) => [kind, counts])));
console.log(
  JSON.stringify({
    bench: 'clusters',
    maskSet: set.name,
    labels: set.clusters.map(({ label }) => label ?? ''),
    rows: rows.length,
    shares: shares.map((share) => Number(share.toFixed(4))),
    information_bits: Number(informationBits(kinds).toFixed(4)),
    kinds,
  }),
);
