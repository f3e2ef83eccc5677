/** Multiple choice: the prompts that the harness makes, its encoding of pairs, and verdicts by hand. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import {
  parseTaskFile,
  readTask,
  toQuestion,
} from '../../../../gpu-backend/learning/evaluation/tasks/read-task.ts';
import {
  encodeChoices,
  judge,
  scoreChoices,
} from '../../../../gpu-backend/learning/evaluation/tasks/score-question.ts';
import { openModelText } from '../../../../gpu-backend/model/tokenizer/model-text.ts';
import { maskFromSkippedLayers } from '../../../../shared/mask/mask.ts';
import { naiveLogs } from './naive-scores.ts';
import { openTinyScorer, tinyHome } from './tiny.ts';

const ARC = {
  question: { stem: 'Why?', choices: [1, 2, 3].map((i) => ({ text: `choice ${i}`, label: 'ABC'[i - 1]! })) },
  answerKey: 'C',
};
const pairs = ({ choices }: ReturnType<typeof toQuestion>) =>
  choices.map(({ context, continuation }) => [context, continuation]);

describe('rows as questions', () => {
  it('ARC, in the authors’ form and in the hub’s', () => {
    const own = toQuestion('arc_easy', ARC);
    expect(pairs(own)[1]).toEqual(['Question: Why?\nAnswer:', ' choice 2']);
    expect(own).toMatchObject({ gold: 2, lengths: [8, 8, 8] });
    const choices = { text: ['choice 1', 'choice 2', 'choice 3'], label: ['A', 'B', 'C'] };
    expect(toQuestion('arc_challenge', { question: 'Why?', choices, answerKey: 'C' })).toEqual(own);
  });

  it('OpenBookQA: the stem alone', () => {
    const row = { question_stem: 'Predators eat', choices: ['lions', 'bunnies'], answer: 1 };
    expect(pairs(toQuestion('openbookqa', row))).toEqual([
      ['Predators eat', ' lions'],
      ['Predators eat', ' bunnies'],
    ]);
  });

  it('WinoGrande: contexts differ, the continuation does not', () => {
    const row = {
      sentence: 'Sarah beat Maria, so _ got the prize.',
      option1: 'Sarah',
      option2: 'Maria',
      answer: '2',
    };
    const found = toQuestion('winogrande', row);
    expect(pairs(found)).toEqual([
      ['Sarah beat Maria, so Sarah', ' got the prize.'],
      ['Sarah beat Maria, so Maria', ' got the prize.'],
    ]);
    expect(found.gold).toBe(1);
  });

  it('HellaSwag: WikiHow’s leftovers go', () => {
    const row = {
      activity_label: 'Home',
      ctx_a: '[header] How to [title] Sit.',
      ctx_b: 'the MAN',
      label: '1',
      endings: ['stands  up [step]', 'sits.'],
    };
    expect(pairs(toQuestion('hellaswag', row))).toEqual([
      ['Home: How to. Sit. The man', ' stands up '],
      ['Home: How to. Sit. The man', ' sits.'],
    ]);
  });

  it.each(['', null, '-1', ' '])('refuses a row of a split without answers, whose label is %j', (label) => {
    const story = { activity_label: 'a', ctx_a: 'b', ctx_b: 'c', endings: ['d', 'e'] };
    expect(() => toQuestion('hellaswag', { ...story, label })).toThrow();
    expect(() => toQuestion('piqa', { goal: 'a', sol1: 'b', sol2: 'c', label })).toThrow();
  });

  it('refuses what is no such row', () => {
    expect(() => toQuestion('piqa', { goal: 'a', sol1: 'b', sol2: 'c', label: 2 })).toThrow(/none of/);
    expect(() => toQuestion('piqa', { goal: 'a', sol1: 'b', sol2: 'c' })).toThrow();
    expect(() => toQuestion('arc_easy', { ...ARC, answerKey: 'E' })).toThrow(/none of the choices/);
    expect(() =>
      toQuestion('winogrande', { sentence: 'x', option1: 'a', option2: 'b', answer: '1' }),
    ).toThrow();
  });
});

describe('task files', () => {
  it('are named by TASK=FILE or by their path', () => {
    expect(parseTaskFile('winogrande/dev.jsonl').task).toBe('winogrande');
    expect(parseTaskFile('arc-challenge=x.jsonl')).toEqual({ task: 'arc_challenge', path: 'x.jsonl' });
    expect(() => parseTaskFile('x.jsonl')).toThrow(/TASK=FILE/);
    expect(() => parseTaskFile('boolq=x.jsonl')).toThrow(/TASK=FILE/);
  });

  it('PIQA’s labels lie beside its rows; a row that is wrong is named', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'maskroute-tasks-'));
    const path = join(folder, 'valid.jsonl');
    const row = { goal: 'Sit', sol1: 'down', sol2: 'up' };
    writeFileSync(path, `${JSON.stringify(row)}\n${JSON.stringify(row)}\n{"goal":1}\n`);
    writeFileSync(join(folder, 'valid-labels.lst'), '1\n0\n1\n');
    const file = { task: 'piqa', path } as const;
    expect((await readTask(file, 2)).map(({ gold }) => gold)).toEqual([1, 0]);
    await expect(readTask(file, 3)).rejects.toThrow('valid.jsonl:3: no row of piqa');
    rmSync(folder, { recursive: true });
  });
});

describe('choices', () => {
  it('are judged by sums and by sums a character, the first of equals', () => {
    const asked = { choices: [], lengths: [2, 10], gold: 1, routeText: '' };
    expect(judge(asked, [-4, -10])).toEqual({ acc: 0, accNorm: 1 });
    expect(judge(asked, [-4, -4])).toEqual({ acc: 0, accNorm: 1 });
    expect(judge({ ...asked, gold: 0 }, [-1, -10])).toEqual({ acc: 1, accNorm: 1 });
  });

  it('have the log-likelihood that a run of each alone gives', async () => {
    using tiny = await tinyHome();
    await using open = await openTinyScorer(tiny);
    const { tokenizer } = await openModelText(tiny.model.folder, tiny.model.manifest);
    const mask = maskFromSkippedLayers(8, { skipAttention: [2], skipFfn: [1] });
    const asked = toQuestion('winogrande', {
      sentence: 'A beat B so _ won it.',
      option1: 'A',
      option2: 'BB',
      answer: '1',
    });
    const choices = encodeChoices(asked, tokenizer, 512);
    const parts = { ...open, cache: open.runner.newCache() };
    const found = await scoreChoices(parts, choices, mask);
    for (const [index, { tokenIds, contextTokens }] of choices.entries()) {
      const logs = await naiveLogs({ tokenIds, scoreFrom: contextTokens - 1 }, mask);
      const expected = logs.reduce((sum, row, i) => sum + row[tokenIds[contextTokens + i]!]!, 0);
      expect(found[index]).toBeCloseTo(expected, 3);
    }
  });

  it('count blanks at the end of a context to the continuation, and lose their start when too long', async () => {
    using tiny = await tinyHome();
    const { tokenizer } = await openModelText(tiny.model.folder, tiny.model.manifest);
    const asked = { choices: [{ context: 'ab ', continuation: 'cd' }], lengths: [2], gold: 0, routeText: '' };
    expect(encodeChoices(asked, tokenizer, 512)[0]).toMatchObject({ contextTokens: 2 });
    expect(encodeChoices(asked, tokenizer, 3)[0]).toMatchObject({ contextTokens: 1 });
    expect(() => encodeChoices(asked, tokenizer, 2)).toThrow(/more than 2 tokens/);
  });
});
