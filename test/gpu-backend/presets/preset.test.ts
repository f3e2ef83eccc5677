/** The preset belongs to the default model and to the table that ships: else every request would go dense. */
import { readdir, readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { STATIC_TABLE_PATH } from '../../../gpu-backend/calibration/encoders.ts';
import { DEFAULT_MODEL, DEFAULT_MODEL_HASH } from '../../../gpu-backend/model/sources/default-model.ts';
import { sha256OfFiles } from '../../../gpu-backend/model/store.ts';
import { surrogatesIdOf } from '../../../gpu-backend/model/surrogates.ts';
import { loadStaticEncoder } from '../../../shared/embedding/static-encoder.ts';
import { clusterSparsity, maskSetSchema, maskSetVersion } from '../../../shared/mask-set.ts';
import { nearestCentroid, packCentroids } from '../../../shared/route.ts';

const folder = new URL(`../../../gpu-backend/presets/${DEFAULT_MODEL}/`, import.meta.url);
const json = async (name: string) => JSON.parse(await readFile(new URL(name, folder), 'utf8'));
const table = fileURLToPath(new URL('surrogates.safetensors', folder));
const encoder = loadStaticEncoder(await readFile(STATIC_TABLE_PATH));

const readSet = async (name: string) => maskSetSchema.parse(await json(name));
const set = await readSet('mask-set.json');

describe.each([
  ['mask-set.json', 'report.json', 8],
  ['mask-set-25.json', 'report-25.json', 15],
])('the preset %s', async (file, report, skipped) => {
  const set = await readSet(file);

  it('is for the default model and the static encoder that ships', () => {
    expect(set.model.hash).toBe(DEFAULT_MODEL_HASH);
    expect(set.encoder).toEqual(encoder.spec);
  });

  it('was learned with the surrogates that ship', async () => {
    expect(set.surrogates).toBe(surrogatesIdOf(await sha256OfFiles([table])));
  });

  it(`has 8 clusters with ${skipped} of 60 blocks out, none with half of the traffic`, () => {
    expect(set.clusters).toHaveLength(8);
    for (const cluster of set.clusters) {
      expect(clusterSparsity(set, cluster)).toBeCloseTo(skipped / 60, 10);
      expect(cluster.share).toBeLessThan(0.5);
    }
    expect(set.clusters.reduce((sum, { share }) => sum + share, 0)).toBeCloseTo(1, 9);
  });

  it('comes with the report of the same run', async () => {
    expect((await json(report)).version).toBe(maskSetVersion(set));
  });
});

describe('the presets', () => {
  it('are two sets, their reports, the table of surrogates, where prompts go, and nothing else', async () => {
    expect((await readdir(folder)).sort()).toEqual([
      'clusters.json',
      'mask-set-25.json',
      'mask-set.json',
      'report-25.json',
      'report.json',
      'surrogates.safetensors',
    ]);
  });

  it('have names of their own', async () => {
    expect((await readSet('mask-set-25.json')).name).not.toBe(set.name);
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
