/** The dashboard's entry: styles, and the application in place. */
import '@picocss/pico/css/pico.min.css';
import './styles.css';
import { QueryClientProvider } from '@tanstack/preact-query';
import { render } from 'preact';
import { z } from 'zod';
import { App } from './app.tsx';
import { queries } from './hooks.ts';
import { applyTheme, storedTheme } from './look.ts';

// Schemas that compile themselves would need `eval`, which the page's policy forbids.
z.config({ jitless: true });
applyTheme(storedTheme());
render(
  <QueryClientProvider client={queries}>
    <App />
  </QueryClientProvider>,
  document.getElementById('app')!,
);
