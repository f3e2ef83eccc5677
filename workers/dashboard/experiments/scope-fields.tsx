/** Whom, what, where and when a new experiment is about: the fields, and what the edge is told of them. */
import type { PlaceScope } from '../../../shared/admin-experiments.ts';

/** One or several, with commas. */
const listOf = (one: string): string => `\\s*${one}(\\s*,\\s*${one})*\\s*`;

const PLACES = [
  {
    name: 'continents',
    title: 'Continents, like EU, NA',
    pattern: listOf('[A-Za-z]{2}'),
    scope: (continent: string): PlaceScope => ({ continent }),
  },
  {
    name: 'countries',
    title: 'Countries, like DE, FR',
    pattern: listOf('[A-Za-z0-9]{2}'),
    scope: (country: string): PlaceScope => ({ country }),
  },
  {
    name: 'colos',
    title: 'Data centres, like FRA, CDG',
    pattern: listOf('[A-Za-z]{3,4}'),
    scope: (colo: string): PlaceScope => ({ colo }),
  },
] as const;

/** `isShared`: of no tenant in particular, so that it may name some. */
export function ScopeFields({ isShared }: { readonly isShared: boolean }) {
  return (
    <>
      <fieldset class="pairs">
        <legend>Where requests come in; any of these (all empty: everywhere)</legend>
        {PLACES.map(({ name, title, pattern }) => (
          <label key={name}>
            {title}
            <input name={name} pattern={pattern} />
          </label>
        ))}
      </fieldset>
      {isShared && (
        <label>
          Tenants, with commas (empty: every one)
          <input name="tenants" pattern={listOf('[a-z0-9][a-z0-9\\-]{0,62}')} />
        </label>
      )}
      <label>
        Models, with commas (empty: every one)
        <input name="models" />
      </label>
      <div class="pairs">
        <label>
          Begins (empty: when it is started)
          <input name="starts_at" type="datetime-local" />
        </label>
        <label>
          Ends (empty: when it is stopped)
          <input name="ends_at" type="datetime-local" />
        </label>
      </div>
    </>
  );
}

/** Fields that were left empty are not in the form. */
export function scopeOf(form: FormData): object {
  const list = (name: string): string[] =>
    (form.get(name)?.toString() ?? '')
      .split(',')
      .map((item) => item.trim())
      .filter((item) => item !== '');
  const time = (name: string) => {
    const value = form.get(name)?.toString();
    return value === undefined ? {} : { [name]: new Date(value).toISOString() };
  };
  return {
    regions: PLACES.flatMap(({ name, scope }) => list(name).map((code) => scope(code.toUpperCase()))),
    tenants: list('tenants'),
    models: list('models'),
    ...time('starts_at'),
    ...time('ends_at'),
  };
}
