/**
 * How well an encoder's clusters tell kinds of prompt apart: mutual information in bits between k-means cluster
 * and kind, for several k and seeds. Kinds are the files' names (or the rows' own `kind`), each with equally many
 * prompts, so log2 of their number is the most that is possible.
 *
 * Run: `node gpu-backend/bench/information.ts --encoder static --encoder all-minilm-l6-v2 --data FILE...`
 * The last line is one JSON object.
 */
import { availableParallelism } from 'node:os';
import { parseArgs } from 'node:util';
import { maskrouteHome } from '../home.ts';
import { embedRows, informationBits, kindTable } from '../learning/data/clusters.ts';
import { openEncoder } from '../learning/data/encoders.ts';
import { kMeans, packPoints } from '../learning/data/kmeans.ts';
import { permutation, seededRandom } from '../learning/data/random.ts';
import { type CalibrationRow, readData } from '../learning/data/read-data.ts';

const { values, positionals } = parseArgs({
  options: {
    encoder: { type: 'string', multiple: true, default: ['static'] },
    clusters: { type: 'string', multiple: true, default: ['8', '16'] },
    data: { type: 'string', multiple: true, default: [] },
    rows: { type: 'string', default: '300' },
    seeds: { type: 'string', default: '5' },
  },
  allowPositionals: true,
});

const { rows } = await readData([...values.data, ...positionals]);
const kinds = balanced(rows, Number(values.rows));
const results: { encoder: string; clusters: number; bits: number; standardError: number }[] = [];
for (const name of values.encoder) {
  const hooks = { onProgress: () => {}, log: (line: string) => console.error(line) };
  const open = await openEncoder(name, { home: maskrouteHome(), threads: availableParallelism(), hooks });
  const points = packPoints(await embedRows(kinds.rows, open.encoder));
  for (const clusters of values.clusters.map(Number)) {
    const bits: number[] = [];
    for (let seed = 1; seed <= Number(values.seeds); seed++) {
      const { assignment } = kMeans(points, { clusterCount: clusters, seed });
      bits.push(informationBits(kindTable(kinds.rows, assignment, clusters)));
    }
    results.push({ encoder: name, clusters, ...meanAndError(bits) });
  }
  await open.close();
}
console.table(results);
console.log(
  JSON.stringify({
    bench: 'information',
    possible: Math.log2(kinds.count),
    rows: kinds.rows.length,
    results,
  }),
);

/** Equally many rows of each kind, as many as the smallest has, at most `most`. */
function balanced(all: readonly CalibrationRow[], most: number): { rows: CalibrationRow[]; count: number } {
  const byKind = Map.groupBy(all, (row) => row.kind);
  const size = Math.min(most, ...[...byKind.values()].map((some) => some.length));
  const random = seededRandom(1);
  const chosen = [...byKind.values()].flatMap((some) =>
    Array.from(permutation(some.length, random).subarray(0, size), (index) => some[index]!),
  );
  return { rows: chosen, count: byKind.size };
}

function meanAndError(numbers: readonly number[]): { bits: number; standardError: number } {
  const mean = numbers.reduce((sum, value) => sum + value, 0) / numbers.length;
  const variance =
    numbers.reduce((sum, value) => sum + (value - mean) ** 2, 0) / Math.max(1, numbers.length - 1);
  const digits = (value: number) => Number(value.toFixed(4));
  return { bits: digits(mean), standardError: digits(Math.sqrt(variance / numbers.length)) };
}
