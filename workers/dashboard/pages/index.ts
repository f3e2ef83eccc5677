/** The pages, in the order of the menu. */
import type { ComponentType } from 'preact';
import { EmbeddingMap } from './embedding-map.tsx';
import { Keys } from './keys.tsx';
import { LiveMasks } from './live-masks.tsx';
import { Playground } from './playground.tsx';
import { Publications } from './publications.tsx';
import { Quality } from './quality.tsx';
import { Tenants } from './tenants.tsx';

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
  { path: '/quality', title: 'Quality', page: Quality },
  { path: '/publications', title: 'Publications', page: Publications },
  { path: '/tenants', title: 'Tenants', page: Tenants },
  { path: '/keys', title: 'Keys', page: Keys },
  { path: '/playground', title: 'Playground', page: Playground },
];
