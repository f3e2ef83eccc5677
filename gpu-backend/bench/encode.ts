/**
 * Time of the static encoder for prompts of several lengths, tokenization included: what every routed request
 * pays at the edge. Run: `node gpu-backend/bench/encode.ts`. The last line is one JSON object.
 */
import { readFile } from 'node:fs/promises';
import { loadStaticEncoder } from '../../shared/embedding/static-encoder.ts';
import { parseStaticTable } from '../../shared/embedding/static-table.ts';
import { loadWordPiece } from '../../shared/embedding/wordpiece.ts';
import { STATIC_TABLE_PATH } from '../calibration/encoders.ts';

const WARM_UP_RUNS = 200;
const RUNS = 2000;
const WORDS =
  'Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did she sell altogether? ';

const bytes = await readFile(STATIC_TABLE_PATH);
const loading = performance.now();
const encoder = loadStaticEncoder(bytes);
const load_ms = performance.now() - loading;
const wordPiece = loadWordPiece(parseStaticTable(bytes).vocabulary);

const rows: { tokens: number; p50_ms: number; p99_ms: number }[] = [];
for (const chars of [60, 265, 1000, 4000]) {
  const texts = Array.from({ length: RUNS }, (_, i) => `${i} ${WORDS.repeat(40)}`.slice(0, chars));
  for (const text of texts.slice(0, WARM_UP_RUNS)) await encoder.embed([text]);
  const times: number[] = [];
  for (const text of texts) {
    const start = performance.now();
    await encoder.embed([text]);
    times.push(performance.now() - start);
  }
  times.sort((a, b) => a - b);
  const at = (share: number) => Number(times[Math.floor(share * times.length)]!.toFixed(4));
  rows.push({ tokens: wordPiece.tokenIds(texts[0]!).length, p50_ms: at(0.5), p99_ms: at(0.99) });
}
console.table(rows);
console.log(JSON.stringify({ bench: 'encode', encoder: encoder.spec, bytes: bytes.length, load_ms, rows }));
