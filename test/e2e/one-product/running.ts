/** The product that `one-product.test.ts` starts, as its parts see it. */
import type { MaskrouteInfo } from '../../../shared/wire/protocol.ts';
import { createHome, removeHome, type Started, start, stop } from '../product.ts';

export let home: string;
export let product: Started;

/** On the home of the product before, if there was one. */
export async function startProduct(env: Record<string, string> = {}): Promise<void> {
  home ??= createHome();
  product = await start(home, env);
}

/** Gives the exit code; a product that ended before is not asked again. */
export async function endProduct(): Promise<number | string> {
  return product.process.exitCode === null ? await stop(product) : await product.ended;
}

/** What the end of an answer says of its mask and its cost. */
export const infoOf = (body: unknown): MaskrouteInfo => (body as { maskroute: MaskrouteInfo }).maskroute;

export const forgetProduct = (): void => removeHome(home);
