/** The product that `one-product.test.ts` starts, as its parts see it. */
import type { MaskrouteInfo } from '../../../shared/wire/protocol.ts';
import { createHome, type Started, start } from '../product.ts';

export let home: string;
export let product: Started;

export async function startProduct(env: Record<string, string>): Promise<void> {
  home = createHome();
  product = await start(home, env);
}

/** What the end of an answer says of its mask and its cost. */
export const infoOf = (body: unknown): MaskrouteInfo => (body as { maskroute: MaskrouteInfo }).maskroute;
