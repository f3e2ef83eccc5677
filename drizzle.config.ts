/** `npx drizzle-kit generate` writes the next numbered SQL file from the schema; wrangler applies it. */
import { defineConfig } from 'drizzle-kit';

export default defineConfig({
  dialect: 'sqlite',
  driver: 'd1-http',
  schema: './workers/db/schema.ts',
  out: './migrations',
});
