/** The product that `one-product.test.ts` starts, as its parts see it. */
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

export const forgetProduct = (): void => removeHome(home);
