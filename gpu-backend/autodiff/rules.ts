/** The table of gradient rules: operator → nodes that carry a gradient from its outputs to its inputs. */
import type { Rule } from './rule.ts';
import { arithmeticRules } from './rules-arithmetic.ts';
import { layoutRules } from './rules-layout.ts';
import { modelRules } from './rules-model.ts';

export const RULES: { readonly [op: string]: Rule } = { ...arithmeticRules, ...layoutRules, ...modelRules };
