/** The preset belongs to the default model and to the table that ships: else every request would go dense. */
import { readdir, readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { STATIC_TABLE_PATH } from '../../../gpu-backend/learning/data/encoders.ts';
import { DEFAULT_MODEL, DEFAULT_MODEL_HASH } from '../../../gpu-backend/model/sources/resolve.ts';
import { sha256OfFiles } from '../../../gpu-backend/model/store.ts';
import { surrogatesIdOf } from '../../../gpu-backend/model/surrogates.ts';
import { evaluationFiguresSchema } from '../../../shared/admin/stats-wire.ts';
import { loadStaticEncoder } from '../../../shared/embedding/static-encoder.ts';
import { nearestCentroid, packCentroids } from '../../../shared/mask/centroids.ts';
import { clusterSparsity, maskSetSchema, maskSetVersion } from '../../../shared/mask/mask-set.ts';

const folder = new URL(`../../../gpu-backend/presets/${DEFAULT_MODEL}/`, import.meta.url);
const json = async (name: string) => JSON.parse(await readFile(new URL(name, folder), 'utf8'));
const table = fileURLToPath(new URL('surrogates.safetensors', folder));
const encoder = loadStaticEncoder(await readFile(STATIC_TABLE_PATH));

const readSet = async (name: string) => maskSetSchema.parse(await json(name));
const set = await readSet('mask-set.json');

/** The share is of a token's time or of the blocks, as `cost` says: blocks of both kinds, or mostly attention. */
const PRESETS = [
  { file: 'mask-set.json', report: 'report.json', clusters: 8, cost: 'time', target: 0.125, skipped: [7, 8] },
  {
    file: 'mask-set-25.json',
    report: 'report-25.json',
    clusters: 64,
    cost: 'time',
    target: 0.25,
    skipped: [14, 18],
  },
  {
    file: 'mask-set-blocks.json',
    report: 'report-blocks.json',
    clusters: 8,
    cost: 'blocks',
    target: 0.125,
    skipped: [8, 8],
  },
  {
    file: 'mask-set-blocks-25.json',
    report: 'report-blocks-25.json',
    clusters: 64,
    cost: 'blocks',
    target: 0.25,
    skipped: [15, 15],
  },
] as const;

/** Where the documents have the figures. */
const MEASURED = await readFile('docs/measured.md', 'utf8');

const evaluationOf = (file: string) => file.replace('mask-set', 'evaluation');

describe.each(PRESETS)('the preset $file', async (preset) => {
  const { file, report, clusters, cost, target } = preset;
  const [least, most] = preset.skipped;
  const set = await readSet(file);

  it('is for the default model and the static encoder that ships', () => {
    expect(set.model.hash).toBe(DEFAULT_MODEL_HASH);
    expect(set.encoder).toEqual(encoder.spec);
  });

  it('was learned with the surrogates that ship', async () => {
    expect(set.surrogates).toBe(surrogatesIdOf(await sha256OfFiles([table])));
  });

  it(`leaves out ${target} of the ${cost}`, () => {
    expect(set.targetSparsity).toBe(target);
    expect(set.learned?.cost).toBe(cost);
  });

  it(`has ${clusters} clusters with ${least} to ${most} of 60 blocks out, none with half of the traffic`, () => {
    expect(set.clusters).toHaveLength(clusters);
    for (const cluster of set.clusters) {
      const skipped = Math.round(60 * clusterSparsity(set, cluster));
      expect(skipped).toBeGreaterThanOrEqual(least);
      expect(skipped).toBeLessThanOrEqual(most);
      expect(cluster.share).toBeLessThan(0.5);
    }
    expect(set.clusters.reduce((sum, { share }) => sum + share, 0)).toBeCloseTo(1, 9);
  });

  it('comes with the report of the same run', async () => {
    expect((await json(report)).version).toBe(maskSetVersion(set));
  });
});

describe.each(PRESETS)('what was measured of $file', async ({ file, cost }) => {
  const version = maskSetVersion(await readSet(file));
  const { rows, equalTime } = evaluationFiguresSchema.parse(await json(evaluationOf(file)));
  const [learned, oneMask] = ['learned', 'one-mask'].map(
    (name) => rows.find(({ method }) => method === name)!,
  );

  it('is of that set: its masks, by cluster and one for all, dense and the static methods', () => {
    const own = rows.filter(({ maskSet }) => maskSet === version).map(({ method }) => method);
    expect(own).toEqual(['learned', 'one-mask']);
    expect(rows.map(({ method }) => method)).toEqual(
      expect.arrayContaining(['dense', 'shortgpt', 'finercut']),
    );
  });

  it('is what the documents say, and has the learned masks no worse than one for all, and ahead of static ones', () => {
    // Where routing does not pay, all clusters share the mask for everybody.
    expect(learned!.kl).toBeLessThanOrEqual(oneMask!.kl);
    // Sets by time leave FFN blocks out, which cost more: their rivals are those that are no slower, to the 3 % that times swing by.
    const rivals = [...rows, ...equalTime].filter(
      ({ method, msPerToken, matched }) =>
        !['dense', 'learned', 'one-mask'].includes(method) &&
        (cost === 'time' ? msPerToken <= 1.03 * learned!.msPerToken : matched === 'count'),
    );
    expect(rivals.length).toBeGreaterThan(1);
    const [best] = rivals.toSorted((a, b) => a.kl - b.kl);
    expect(best!.kl).toBeGreaterThan(learned!.kl);
    const [ours, one, others] = [learned!, oneMask!, best!].map(
      ({ kl, perplexity }) => `${kl.toFixed(2)}, ${perplexity.toFixed(1)}`,
    );
    const rival = cost === 'time' ? 'same speed' : 'same sparsity';
    expect(MEASURED).toContain(`| ${ours} | ${one} | ${rival}: ${others} |\n`);
  });
});

describe('the presets', () => {
  it('are sets, their reports, what was measured of them, the table of surrogates, where prompts go, and nothing else', async () => {
    const files = PRESETS.flatMap(({ file, report }) => [file, report, evaluationOf(file)]);
    expect((await readdir(folder)).sort()).toEqual(
      [...files, 'clusters.json', 'surrogates.safetensors'].sort(),
    );
  });

  it('have names of their own', async () => {
    const names = await Promise.all(PRESETS.map(async ({ file }) => (await readSet(file)).name));
    expect(new Set(names).size).toBe(PRESETS.length);
  });

  it('send different kinds of prompt to different clusters', async () => {
    const prompts = [
      'Natalia sold clips to 48 of her friends in April, and half as many in May. How many did she sell altogether?',
      'Write a function to find the similar elements from the given two tuple lists.',
      'Je voudrais savoir si le train pour Lyon part à huit heures demain matin.',
      'What is my credit card limit, and can I raise it today?',
      'Which of these is a renewable source of energy?\nA. coal\nB. wind\nC. oil\nD. natural gas',
    ];
    const centroids = packCentroids(set.clusters.map((cluster) => cluster.centroid));
    const vectors = await encoder.embed(prompts);
    const clusters = vectors.map((vector) => nearestCentroid(vector, centroids).cluster);
    expect(new Set(clusters).size).toBe(prompts.length);
  });
});
