/** Rewritten grammars have the same texts, and xgrammar lets no others through. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import {
  chars,
  choice,
  type Expression,
  printGrammar,
  type Rules,
  repeat,
  rule,
  sequence,
  text,
} from '../../../gpu-backend/grammar/ebnf.ts';
import { separated } from '../../../gpu-backend/grammar/separated-choices.ts';
import { isWithin } from '../../../gpu-backend/grammar/text-inclusion.ts';
import { createRandom } from '../../../gpu-backend/random.ts';
import { type GrammarPlayer, openGrammarPlayer } from '../../support/grammar-player.ts';

let player: GrammarPlayer;
beforeAll(async () => {
  player = await openGrammarPlayer();
}, 60_000);
afterAll(async () => {
  await player[Symbol.asyncDispose]();
});

type Random = ReturnType<typeof createRandom>;
/** Letters of one, two and three bytes; some have their first byte in common. */
const LETTERS = ['a', 'b', 'c', 'd', 'é', 'è', '日', '旦'];
const oneOf = <T>(random: Random, all: readonly T[]): T => all[random.below(all.length)]!;
const many = <T>(count: number, make: () => T): T[] => Array.from({ length: count }, make);
const wordOf = (random: Random, letters: readonly string[]): string =>
  many(1 + random.below(6), () => oneOf(random, letters)).join('');
const classOf = (...ranges: readonly string[]): Expression =>
  chars(...ranges.map((range) => [range.codePointAt(0)!, range.codePointAt(range.length - 1)!] as const));

function leafOf(random: Random): Expression {
  const classes = ['a', 'ab', 'ac', 'bc', 'bd'].map((range) => classOf(range));
  const other = [classOf('a', 'c'), classOf('bc', 'd'), chars([0x61, 0x62], [0x80, 0x10ffff])];
  return oneOf(random, [text(wordOf(random, LETTERS)), text(oneOf(random, LETTERS)), ...classes, ...other]);
}

/** `names`: rules that it may refer to. */
function expressionOf(random: Random, depth: number, names: readonly string[]): Expression {
  const kind = random.below(12);
  if (kind === 0 && names.length > 0) return rule(oneOf(random, names));
  if (depth === 0 || kind < 4) return leafOf(random);
  const part = () => expressionOf(random, depth - 1, names);
  if (kind < 7) return choice(...many(2 + random.below(3), part));
  if (kind < 9) return sequence(...many(2 + random.below(3), part));
  const min = random.below(3);
  return repeat(part(), min, random.below(2) === 0 ? undefined : min + 1 + random.below(3));
}

function grammarOf(seed: number, depth = 4): { readonly rules: Rules; readonly root: Expression } {
  const random = createRandom(seed);
  const rules = new Map([
    ['one', expressionOf(random, 1, [])],
    ['two', expressionOf(random, 2, ['one'])],
  ]);
  return { rules, root: expressionOf(random, depth, [...rules.keys()]) };
}

/** With rules written out; none is recursive. */
function whole({ rules, root }: { readonly rules: Rules; readonly root: Expression }): Expression {
  const written = (expression: Expression): Expression => {
    switch (expression.kind) {
      case 'rule':
        return written(rules.get(expression.name)!);
      case 'sequence':
        return sequence(...expression.parts.map(written));
      case 'choice':
        return choice(...expression.options.map(written));
      case 'repeat':
        return repeat(written(expression.part), expression.min, expression.max);
      default:
        return expression;
    }
  };
  return written(root);
}

const isTextOf = (value: string, expression: Expression): boolean =>
  isWithin(text(value), expression, { left: 1e6 });

/** Texts that the library lets through. */
async function generated({ rules, root }: { rules: Rules; root: Expression }, count: number) {
  const found = separated(rules, root);
  const answer = printGrammar(found.rules, found.root);
  const texts: string[] = [];
  for (let seed = 0; seed < count; seed++) {
    const played = await player.play({ answer, calls: undefined }, seed, 40);
    if (played.ended) texts.push(played.text);
  }
  return texts;
}

test('the texts stay the same', () => {
  for (let seed = 0; seed < 100; seed++) {
    const grammar = grammarOf(seed, 2);
    const [before, after] = [whole(grammar), whole(separated(grammar.rules, grammar.root))];
    expect(isWithin(before, after, { left: 1e8 }), `${seed}: one is missing`).toBe(true);
    expect(isWithin(after, before, { left: 1e8 }), `${seed}: one is new`).toBe(true);
  }
});

describe('the library lets no other text through', () => {
  test.each([5, 15, 60])('%i words', async (count) => {
    for (let seed = 0; seed < 6; seed++) {
      const random = createRandom(1000 * count + seed);
      const letters = seed % 2 === 0 ? LETTERS.slice(0, 3) : LETTERS;
      const words = many(count, () => wordOf(random, letters));
      const texts = await generated({ rules: new Map(), root: choice(...words.map(text)) }, 8);
      for (const found of texts) expect(words).toContain(found);
      expect(texts.length).toBe(8);
    }
  });

  test('a loop before what is in it', async () => {
    const loop = repeat(classOf('a'), 0);
    const root = sequence(loop, text('abc'));
    for (const found of await generated({ rules: new Map(), root }, 12)) expect(found).toMatch(/^a+bc$/);
  });

  test('nested choices, repetitions and rules', async () => {
    let ended = 0;
    for (let seed = 0; seed < 60; seed++) {
      const grammar = grammarOf(seed);
      const texts = await generated(grammar, 4);
      for (const found of texts) expect(isTextOf(found, whole(grammar)), `${seed}: ${found}`).toBe(true);
      ended += texts.length;
    }
    expect(ended).toBeGreaterThan(150);
  });
});
