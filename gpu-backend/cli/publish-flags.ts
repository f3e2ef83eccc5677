/** Start time, rollout and bounds of a publication, as `publish` takes them on the command line. */
import { z } from 'zod';
import type { AutoRollback } from '../../shared/admin/publication-wire.ts';
import type { RolloutStep } from '../../shared/mask/sticky.ts';
import { MaskrouteError } from '../../shared/wire/errors.ts';
import type { PublishSchedule } from '../publication/publish.ts';

export type ScheduleFlags = {
  /** An ISO time with its zone. */
  readonly at?: string;
  /** Steps such as `1%:10m,10%:1h`. */
  readonly rollout?: string;
  readonly maxErrorRate?: number;
  readonly maxSlowdown?: number;
  readonly maxTokenMs?: number;
  readonly minRequests?: number;
};

/** @throws MaskrouteError `invalid_argument` naming the flag. */
export function parseSchedule(flags: ScheduleFlags): PublishSchedule {
  const bounds = parseBounds(flags);
  return {
    ...(flags.at === undefined ? {} : { activate_at: parseTime(flags.at) }),
    ...(flags.rollout === undefined ? {} : { rollout: parseRollout(flags.rollout) }),
    ...(bounds === undefined ? {} : { auto_rollback: bounds }),
  };
}

/** `Date` alone would read 30 February as 2 March. */
const zonedTime = z.iso.datetime({ offset: true });

function parseTime(text: string): string {
  if (zonedTime.safeParse(text).success) return new Date(text).toISOString();
  throw invalid(`--at takes a time like 2026-01-31T09:00:00Z, not "${text}"`);
}

const UNIT_s = { s: 1, m: 60, h: 3600, d: 86_400 } as const;

function parseRollout(text: string): RolloutStep[] {
  return text.split(',').map((step) => {
    const match = /^\s*(\d+(?:\.\d+)?)%:(\d+)([smhd])\s*$/.exec(step);
    if (match === null) throw invalid(`--rollout takes steps like 1%:10m,10%:1h, not "${step}"`);
    const [, percent, count, unit] = match;
    const duration_s = Number(count) * UNIT_s[unit as keyof typeof UNIT_s];
    return { share: Number(percent) / 100, duration_s };
  });
}

function parseBounds({
  maxErrorRate,
  maxSlowdown,
  maxTokenMs,
  minRequests,
}: ScheduleFlags): Partial<AutoRollback> | undefined {
  const bounds = {
    ...(maxErrorRate === undefined ? {} : { error_rate_max: maxErrorRate }),
    ...(maxSlowdown === undefined ? {} : { tpot_ratio_max: maxSlowdown }),
    ...(maxTokenMs === undefined ? {} : { tpot_ms_max: maxTokenMs }),
  };
  if (Object.keys(bounds).length > 0) {
    return minRequests === undefined ? bounds : { ...bounds, requests_min: minRequests };
  }
  if (minRequests === undefined) return undefined;
  throw invalid('--min-requests goes with a bound: --max-error-rate, --max-slowdown or --max-token-ms');
}

const invalid = (message: string) => new MaskrouteError('invalid_argument', `${message}.`);
