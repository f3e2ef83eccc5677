/** Hard concrete gates, the Lagrangian and Adam: properties, and derivatives against finite differences. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import {
  adamStep,
  clampLogAlpha,
  expectedSparsity,
  HARD_CONCRETE,
  newAdam,
  normalizedWeights,
  openProbability,
  openProbabilitySlope,
  sampleGate,
  shiftToSparsity,
  sparsityPenalty,
} from '../../../../gpu-backend/learning/gates/hard-concrete.ts';
import { seededRandom } from '../../../../gpu-backend/random.ts';

const logAlpha = fc.double({ min: -4.6, max: 4.6, noNaN: true });
const noise = fc.double({ min: 0, max: 1, noNaN: true });
const difference = (f: (x: number) => number, x: number, h = 1e-5) => (f(x + h) - f(x - h)) / (2 * h);

describe('hard concrete gates', () => {
  test('lie in [0, 1], and open further with logAlpha and with the noise', () => {
    fc.assert(
      fc.property(logAlpha, noise, fc.double({ min: 0, max: 1, noNaN: true }), (a, u, more) => {
        const { gate } = sampleGate(a, u);
        expect(gate).toBeGreaterThanOrEqual(0);
        expect(gate).toBeLessThanOrEqual(1);
        expect(sampleGate(a + more, u).gate).toBeGreaterThanOrEqual(gate);
        expect(sampleGate(a, Math.min(1, u + more)).gate).toBeGreaterThanOrEqual(gate);
      }),
    );
  });

  test('the slope is the derivative for the same noise, 0 where the gate is clamped', () => {
    fc.assert(
      fc.property(logAlpha, noise, (a, u) => {
        const { gate, slope } = sampleGate(a, u);
        // The derivative jumps at the clamps.
        const near = [sampleGate(a - 1e-4, u).gate, sampleGate(a + 1e-4, u).gate];
        if (near.some((other) => (other === 0 || other === 1) !== (gate === 0 || gate === 1))) return;
        expect(slope).toBeCloseTo(
          difference((x) => sampleGate(x, u).gate, a),
          6,
        );
      }),
    );
  });

  test('are 0 as often as the L0 penalty says (three standard errors of 20,000 draws)', () => {
    const random = seededRandom(3);
    for (const a of [-2, -0.5, 0, 1, 2.5]) {
      let open = 0;
      for (let i = 0; i < 20_000; i++) open += sampleGate(a, random()).gate > 0 ? 1 : 0;
      const p = openProbability(a);
      expect(Math.abs(open / 20_000 - p)).toBeLessThan(3 * Math.sqrt((p * (1 - p)) / 20_000));
    }
  });

  test('probability and slope belong together', () => {
    fc.assert(
      fc.property(logAlpha, (a) => {
        expect(openProbabilitySlope(a)).toBeCloseTo(difference(openProbability, a), 7);
      }),
    );
  });

  test('logAlpha stays where a gate can still change its mind', () => {
    expect(clampLogAlpha(100)).toBe(HARD_CONCRETE.logAlphaMax);
    expect(clampLogAlpha(-100)).toBe(HARD_CONCRETE.logAlphaMin);
    expect(clampLogAlpha(1.5)).toBe(1.5);
    expect(Number.isFinite(sampleGate(2, 0).gate + sampleGate(2, 1).gate)).toBe(true);
  });
});

describe('the Lagrangian', () => {
  const logAlphas = fc.array(logAlpha, { minLength: 1, maxLength: 12 });
  const weightsFor = (count: number) =>
    normalizedWeights(Array.from({ length: count }, (_, i) => 1 + (i % 3)));

  test('its gradients are those of its value', () => {
    const multiplier = fc.double({ min: -3, max: 3, noNaN: true });
    fc.assert(
      fc.property(logAlphas, multiplier, multiplier, (values, linear, quadratic) => {
        const weights = weightsFor(values.length);
        const value = (changed: readonly number[], l: number, q: number) => {
          const excess = expectedSparsity(changed, weights) - 0.25;
          return l * excess + q * excess ** 2;
        };
        const penalty = sparsityPenalty(values, weights, 0.25, [linear, quadratic]);
        values.forEach((at, i) => {
          const moved = (x: number) => value(values.with(i, x), linear, quadratic);
          expect(penalty.logAlphaGradients[i]).toBeCloseTo(difference(moved, at), 6);
        });
        const [ofLinear, ofQuadratic] = penalty.multiplierGradients;
        expect(ofLinear).toBeCloseTo(
          difference((l) => value(values, l, quadratic), linear),
          6,
        );
        expect(ofQuadratic).toBeCloseTo(
          difference((q) => value(values, linear, q), quadratic),
          6,
        );
      }),
    );
  });

  test('a shift reaches any target and keeps the order', () => {
    fc.assert(
      fc.property(logAlphas, fc.double({ min: 0.01, max: 0.99, noNaN: true }), (values, target) => {
        const weights = weightsFor(values.length);
        const shift = shiftToSparsity(values, weights, target);
        const shifted = values.map((value) => value + shift);
        expect(expectedSparsity(shifted, weights)).toBeCloseTo(target, 9);
      }),
    );
  });

  test('weights and targets that mean nothing are refused', () => {
    expect(() => normalizedWeights([0, 0])).toThrow(RangeError);
    expect(() => normalizedWeights([1, -1, 3])).toThrow(RangeError);
    expect(() => normalizedWeights([1, Number.NaN])).toThrow(RangeError);
    expect(() => shiftToSparsity([0], [1], 1)).toThrow(RangeError);
  });

  test('descent on the gates and ascent on the multipliers end at the target', () => {
    const weights = normalizedWeights(Array(20).fill(1));
    let values = Array.from({ length: 20 }, (_, i) => 1 + i / 10);
    let multipliers: readonly number[] = [0, 0];
    let [gateState, multiplierState] = [newAdam(20), newAdam(2)];
    for (let step = 0; step < 400; step++) {
      const [linear, quadratic] = multipliers as [number, number];
      const penalty = sparsityPenalty(values, weights, 0.3, [linear, quadratic]);
      const gates = adamStep(values, penalty.logAlphaGradients, gateState, 0.05);
      const ascent = penalty.multiplierGradients.map((gradient) => -gradient);
      const moved = adamStep(multipliers, ascent, multiplierState, 0.05);
      [values, gateState] = [gates.values.map(clampLogAlpha), gates.state];
      [multipliers, multiplierState] = [moved.values, moved.state];
    }
    expect(expectedSparsity(values, weights)).toBeCloseTo(0.3, 1);
  });
});

describe('Adam', () => {
  const PYTORCH = [0.8274177428854115, -1.9677376894782834];

  test('the first step has the size of the learning rate, against the gradient', () => {
    const { values } = adamStep([1, 1, 1], [0.001, -50, 0], newAdam(3), 0.1);
    expect(values[0]).toBeCloseTo(0.9, 5);
    expect(values[1]).toBeCloseTo(1.1, 5);
    expect(values[2]).toBe(1);
  });

  test('three steps equal PyTorch 2.13 (torch.optim.Adam, lr 0.1, doubles)', () => {
    let values = [1, -2];
    let state = newAdam(2);
    for (const gradients of [
      [0.5, -1],
      [0.25, 2],
      [-1, 0.1],
    ]) {
      ({ values, state } = adamStep(values, gradients, state, 0.1));
    }
    expect(values[0]).toBeCloseTo(PYTORCH[0]!, 12);
    expect(values[1]).toBeCloseTo(PYTORCH[1]!, 12);
  });
});
