/** The pages, in the order of the menu. */
import type { ComponentType } from 'preact';
import { Backends } from './backends.tsx';
import { EmbeddingMap } from './embedding-map.tsx';
import { Experiments } from './experiments.tsx';
import { Keys } from './keys.tsx';
import { LiveMasks } from './live-masks.tsx';
import { Playground } from './playground.tsx';
import { Publications } from './publications.tsx';
import { Quality } from './quality.tsx';
import { RoutingShares } from './routing.tsx';
import { Tenants } from './tenants.tsx';
import { Usage } from './usage.tsx';

export type Page = {
  readonly path: string;
  readonly title: string;
  /** Only for those who manage all tenants. */
  readonly isGlobal?: boolean;
  readonly page: ComponentType;
};

export const PAGES: readonly Page[] = [
  { path: '/', title: 'Live masks', page: LiveMasks },
  { path: '/map', title: 'Embedding map', page: EmbeddingMap },
  { path: '/routing', title: 'Routing', page: RoutingShares },
  { path: '/quality', title: 'Quality', page: Quality },
  { path: '/publications', title: 'Publications', page: Publications },
  { path: '/experiments', title: 'Experiments', page: Experiments },
  { path: '/tenants', title: 'Tenants', page: Tenants },
  { path: '/keys', title: 'Keys', page: Keys },
  { path: '/usage', title: 'Usage', page: Usage },
  { path: '/backends', title: 'Backends', isGlobal: true, page: Backends },
  { path: '/playground', title: 'Playground', page: Playground },
];
