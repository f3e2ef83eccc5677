/** A cluster's own mask is taken when it leads the mask for everybody on text that did not choose it. */
import { describe, expect, it } from 'vitest';
import type { Candidate } from '../../../../gpu-backend/learning/search/search-masks.ts';
import { confirmChoice } from '../../../../gpu-backend/learning/search/search-masks.ts';
import type { Lead } from '../../../../gpu-backend/learning/search/workbench.ts';

const candidate = (source: string, bits: string, kl: number): Candidate => ({
  source,
  mask: { runs: Uint8Array.from(bits, Number) },
  kl,
});
const own = candidate('swaps', '1011', 0.1);
const other = candidate('cluster 3', '1110', 0.11);
const one = candidate('one mask', '0111', 0.12);

async function choose(candidates: Candidate[], lead: Lead | undefined) {
  const compared: unknown[] = [];
  const choice = await confirmChoice(
    candidates,
    { runs: Uint8Array.from(one.mask.runs) },
    {
      leadBeyondGlance: async (mask, rival) => {
        compared.push([[...mask.runs].join(''), [...rival.runs].join('')]);
        return lead;
      },
    },
  );
  return { compared, choice };
}

describe('a choice', () => {
  it('is confirmed by a lead that is more than chance', async () => {
    const lead = { mean: 0.01, standardError: 0.004 };
    const { compared, choice } = await choose([own, other, one], lead);
    expect(compared).toEqual([['1011', '0111']]);
    expect(choice).toEqual({ ...{ mask: own.mask, source: 'swaps', lead }, candidates: [own, other, one] });
  });

  it.each([
    ['within chance', { mean: 0.003, standardError: 0.004 }],
    ['the other way', { mean: -0.01, standardError: 0.004 }],
    ['of a single batch', { mean: 0.01, standardError: Number.POSITIVE_INFINITY }],
  ])('goes to the mask for everybody when the lead is %s', async (_what, lead) => {
    const { choice } = await choose([own, other, one], lead);
    expect(choice).toEqual({
      ...{ mask: one.mask, source: 'one mask', lead },
      candidates: [one, own, other],
    });
  });

  it('stands where there is no more text', async () => {
    const { choice } = await choose([own, one], undefined);
    expect(choice).toMatchObject({ source: 'swaps', lead: undefined });
  });

  it('of the mask for everybody needs no other', async () => {
    const { compared, choice } = await choose([one, own], { mean: 1, standardError: 0 });
    expect(compared).toEqual([]);
    expect(choice).toMatchObject({ source: 'one mask', lead: undefined });
  });
});
