/** A job's request as arguments of the command line: jobs do nothing that a person could not do there. */
import { DEFAULT_TENANT } from '../../shared/admin.ts';
import type { JobRequest } from '../../shared/jobs.ts';

export function learnArguments(request: JobRequest, files: readonly string[], out: string): string[] {
  const { model, clusters, sparsity, cost, surrogate, encoder, name, rows, seed } = request;
  return [
    'learn',
    ...['--model', model!],
    ...['--data', ...files],
    ...['--clusters', String(clusters)],
    ...['--sparsity', String(sparsity)],
    ...['--encoder', encoder],
    ...['--out', out],
    ...['--name', name ?? 'learned'],
    ...(cost === undefined ? [] : ['--cost', cost]),
    ...(surrogate === undefined ? [] : [surrogate ? '--surrogate' : '--no-surrogate']),
    ...(rows === undefined ? [] : ['--rows', String(rows)]),
    ...(seed === undefined ? [] : ['--seed', String(seed)]),
  ];
}

export const publishArguments = (
  { edge, tenant, activate }: NonNullable<JobRequest['publish']>,
  file: string,
): string[] => [
  'publish',
  file,
  ...['--edge', edge],
  ...(tenant === DEFAULT_TENANT ? [] : ['--tenant', tenant]),
  ...(activate ? ['--activate'] : []),
];
