/**
 * What is live, for whom, since when; which mask a prompt gets of it. Rollouts come before anything is live for everybody, and
 * what is read of experiments is counted before there are others.
 */
import { describe } from 'vitest';

describe('rollouts', async () => void (await import('./releases/rollouts.ts')));
describe('encoders', async () => void (await import('./routing/encoders.ts')));
describe('live sets', async () => void (await import('./routing/live-sets.ts')));
describe('experiments', async () => void (await import('./releases/experiments.ts')));
describe('rows of a later version', async () => void (await import('./db/later-rows.ts')));
describe('publishing', async () => void (await import('./releases/publishing.ts')));
