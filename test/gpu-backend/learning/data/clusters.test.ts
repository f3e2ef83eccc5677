import { describe, expect, it } from 'vitest';
import { clusterLabel, informationBits, kindTable } from '../../../../gpu-backend/learning/data/clusters.ts';
import { parseRow } from '../../../../gpu-backend/learning/data/read-data.ts';

const table = (...rows: [string, number[]][]) => rows.map(([kind, counts]) => ({ kind, counts }));

describe('the table of kind × cluster', () => {
  it('counts the prompts of each kind', () => {
    const rows = ['math', 'code', 'math'].map((kind) => parseRow(`{"text":"x","kind":"${kind}"}`, '', 'f:1'));
    expect(kindTable(rows, [1, 0, 2], 3)).toEqual(table(['math', [0, 1, 1]], ['code', [1, 0, 0]]));
  });

  it('holds as many bits as clusters tell about kinds', () => {
    expect(informationBits(table(['a', [5, 0]], ['b', [0, 5]]))).toBeCloseTo(1, 12);
    expect(informationBits(table(['a', [5, 5]], ['b', [3, 3]]))).toBeCloseTo(0, 12);
    expect(informationBits(table(['a', [4, 0, 0, 0]], ['b', [0, 1, 1, 2]]))).toBeCloseTo(1, 12);
    // H(kind) − H(kind | cluster) by hand: 1 − (3/4 · H(1/3)).
    const third = -(1 / 3) * Math.log2(1 / 3) - (2 / 3) * Math.log2(2 / 3);
    expect(informationBits(table(['a', [2, 0]], ['b', [1, 1]]))).toBeCloseTo(1 - 0.75 * third, 12);
    expect(informationBits([])).toBe(0);
  });

  it('names a cluster by what dominates it', () => {
    const kinds = table(['math', [10, 0]], ['code', [5, 1]], ['talk', [1, 0]]);
    expect(clusterLabel(kinds, 0)).toBe('math 63 %, code 31 %');
    expect(clusterLabel(kinds, 1)).toBe('code 100 %');
  });
});
