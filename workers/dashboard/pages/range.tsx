/** The time that a page is about: picked, and kept in the address. */
import { Choice } from '../components/controls.tsx';
import { useAddressOf } from '../hooks.ts';

const HOUR_ms = 3_600_000;
const RANGES = {
  hour: { title: 'last hour', step: 'minute', step_ms: 60_000, steps: 60 },
  day: { title: 'last 24 hours', step: 'hour', step_ms: HOUR_ms, steps: 24 },
  week: { title: 'last 7 days', step: 'hour', step_ms: HOUR_ms, steps: 168 },
  month: { title: 'last 30 days', step: 'day', step_ms: 24 * HOUR_ms, steps: 30 },
} as const;
export type Range = (typeof RANGES)[keyof typeof RANGES] & { readonly name: string };

export function useRange(): { readonly range: Range; readonly picker: preact.JSX.Element } {
  const [name, setName] = useAddressOf('range', Object.keys(RANGES) as (keyof typeof RANGES)[], 'day');
  const options = Object.entries(RANGES).map(([value, { title }]) => [value, title] as const);
  return {
    range: { ...RANGES[name], name },
    picker: <Choice title="Time" value={name} options={options} onPick={setName} />,
  };
}

/** The beginning of the range: of whole steps, this one included. */
export function startOf_ms({ step_ms, steps }: Range, now_ms: number): number {
  return Math.floor(now_ms / step_ms) * step_ms - (steps - 1) * step_ms;
}
