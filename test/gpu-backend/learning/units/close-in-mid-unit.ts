/** As a program (`close-in-mid-unit.ts HOME MODEL UNIT`, the unit as JSON): a thread is closed while it computes, three times. */
import { setTimeout as sleep } from 'node:timers/promises';
import { openUnitThread } from '../../../../gpu-backend/learning/units/unit-thread.ts';
import { openInstalled } from '../../../../gpu-backend/model/store.ts';

const [home, name, unit] = process.argv.slice(2) as [string, string, string];
const model = await openInstalled(home, name);
for (const wait_ms of [100, 150, 200]) {
  const thread = openUnitThread({ model, surrogates: undefined, threads: 1, rounding: 'blocks' });
  await thread.run(JSON.parse(unit));
  const cut = thread.run(JSON.parse(unit)).then(
    () => 'computed',
    ({ message }: Error) => message,
  );
  await sleep(wait_ms);
  await thread.close();
  console.log(await cut);
}
