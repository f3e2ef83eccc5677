/** The dashboard's entry: styles, and the application in place. */
import '@picocss/pico/css/pico.min.css';
import './styles.css';
import { render } from 'preact';
import { z } from 'zod';
import { App } from './app.tsx';
import { applyTheme, storedTheme } from './look.ts';

// Schemas that compile themselves would need `eval`, which the page's policy forbids.
z.config({ jitless: true });
applyTheme(storedTheme());
render(<App />, document.getElementById('app')!);
