/** Counts what vitest's JSON report says, so that nothing that went wrong is left out of the sum. */
import { z } from 'zod';

export type Counts = { readonly passed: number; readonly failed: number };

const reportSchema = z.object({
  numPassedTests: z.int(),
  numFailedTests: z.int(),
  testResults: z.array(
    z.object({ status: z.string(), assertionResults: z.array(z.object({ status: z.string() })) }),
  ),
});

/**
 * `green` is whether the runner itself was content. A file that failed outside its tests counts as one
 * failure; so do a runner that failed for no test's fault, no report, and a run of no test at all.
 */
export function countReport(text: string, green: boolean): Counts {
  const report = parse(text);
  if (report === undefined) return { passed: 0, failed: 1 };
  const filesFailedOutside = report.testResults.filter(
    (file) => file.status === 'failed' && file.assertionResults.every((test) => test.status !== 'failed'),
  ).length;
  const failed = report.numFailedTests + filesFailedOutside;
  const unexplained = failed === 0 && (!green || report.numPassedTests === 0);
  return { passed: report.numPassedTests, failed: unexplained ? 1 : failed };
}

function parse(text: string): z.infer<typeof reportSchema> | undefined {
  try {
    return reportSchema.parse(JSON.parse(text));
  } catch {
    return undefined;
  }
}
