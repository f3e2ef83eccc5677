/**
 * Time of the static encoder for prompts of several lengths, tokenization included: what every routed request
 * pays at the edge.
 */
import { readFile } from 'node:fs/promises';
import type { Encoder } from '../../shared/embedding/encoder.ts';
import { loadStaticEncoder } from '../../shared/embedding/static-encoder.ts';
import { parseStaticTable } from '../../shared/embedding/static-table.ts';
import { loadWordPiece } from '../../shared/embedding/wordpiece.ts';
import { STATIC_TABLE_PATH, staticKernel } from '../calibration/encoders.ts';

const WARM_UP_RUNS = 200;
const RUNS = 2000;
const WORDS =
  'Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did she sell altogether? ';

type Row = { readonly tokens: number; readonly p50_ms: number; readonly p99_ms: number };

/** The table that ships, in this process; `say` gets lines for people. */
export async function benchEncode(say: (line: string) => void) {
  const bytes = await readFile(STATIC_TABLE_PATH);
  const kernel = await staticKernel();
  const start_ms = performance.now();
  const encoder = loadStaticEncoder(bytes, kernel);
  const load_ms = performance.now() - start_ms;
  const wordPiece = loadWordPiece(parseStaticTable(bytes).vocabulary);
  const rows: Row[] = [];
  for (const chars of [60, 265, 1000, 4000]) {
    const texts = Array.from({ length: RUNS }, (_, i) => `${i} ${WORDS.repeat(40)}`.slice(0, chars));
    const row = { tokens: wordPiece.tokenIds(texts[0]!).length, ...(await timeEach(encoder, texts)) };
    say(`${row.tokens} tokens: median ${row.p50_ms} ms, p99 ${row.p99_ms} ms`);
    rows.push(row);
  }
  return { bench: 'encode', encoder: encoder.spec, bytes: bytes.length, load_ms, rows };
}

async function timeEach(encoder: Encoder, texts: readonly string[]): Promise<Omit<Row, 'tokens'>> {
  for (const text of texts.slice(0, WARM_UP_RUNS)) await encoder.embed([text]);
  const times: number[] = [];
  for (const text of texts) {
    const start_ms = performance.now();
    await encoder.embed([text]);
    times.push(performance.now() - start_ms);
  }
  times.sort((a, b) => a - b);
  const at = (share: number) => Number(times[Math.floor(share * times.length)]!.toFixed(4));
  return { p50_ms: at(0.5), p99_ms: at(0.99) };
}
