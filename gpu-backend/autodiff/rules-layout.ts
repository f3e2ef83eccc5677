/** Gradient rules of operators that only move values. */
import type { Value } from '../onnx/graph.ts';
import type { Rule, RuleContext } from './rule.ts';
import { only, zerosLike } from './rule.ts';
import { axisOf } from './shapes.ts';

const axisAttribute = (c: RuleContext): number => axisOf((c.node.attributes.axis as number) ?? 0, c.shape(0));

export const layoutRules: { readonly [op: string]: Rule } = {
  Reshape: (c) => [c.g.op('Reshape', [only(c), c.g.op('Shape', [c.input(0)])]), undefined],
  Transpose: (c) => {
    const perm = c.node.attributes.perm as readonly number[];
    return [c.g.op('Transpose', [only(c)], { perm: perm.map((_, axis) => perm.indexOf(axis)) })];
  },
  Split: (c) => {
    const parts = c.node.outputs.map((_, i) => c.gradient(i) ?? zerosLike(c.g, c.output(i)));
    return [c.g.op('Concat', parts, { axis: axisAttribute(c) }), undefined];
  },
  Concat: (c) => {
    const axis = axisAttribute(c);
    const size = (_: string, i: number): Value =>
      c.g.op('Shape', [c.input(i)], { start: axis, end: axis + 1 });
    const sizes = c.g.op('Concat', c.node.inputs.map(size), { axis: 0 });
    return c.g.ops('Split', [only(c), sizes], c.node.inputs.length, { axis });
  },
  // Rows of x by number; a row taken twice gets both gradients.
  Gather: (c) => {
    if (axisAttribute(c) !== 0) throw new Error('Gather is differentiated along axis 0 alone');
    const indices = c.g.op('Unsqueeze', [c.input(1), c.g.constant('i64', [1], [-1])]);
    return [
      c.g.op('ScatterND', [zerosLike(c.g, c.input(0)), indices, only(c)], { reduction: 'add' }),
      undefined,
    ];
  },
};
