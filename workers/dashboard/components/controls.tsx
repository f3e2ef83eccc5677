/** What people press and fill in, outside of dialogs and inside; and what a form's fields mean. */

/** A choice that holds at once. `options` are values with their titles, in the order of the list. */
export function Choice<T extends string>(props: {
  readonly title: string;
  readonly value: T;
  readonly options: readonly (readonly [value: string, title: string])[];
  readonly onPick: (value: T) => void;
  /** In a form: the name of the field. */
  readonly name?: string;
  readonly class?: string;
}) {
  return (
    <label class={props.class}>
      {props.title}
      <select
        name={props.name}
        value={props.value}
        onChange={(event) => props.onPick(event.currentTarget.value as T)}
      >
        {props.options.map(([value, title]) => (
          <option key={value} value={value}>
            {title}
          </option>
        ))}
      </select>
    </label>
  );
}

/** A button in a row of a table. Those who cannot see the row hear what it is about. */
export const RowButton = (props: {
  readonly title: string;
  readonly about: string;
  readonly onClick: () => void;
}) => (
  <button type="button" class="small outline" onClick={props.onClick}>
    {props.title} <span class="hidden">{props.about}</span>
  </button>
);

/** The items of a field that takes several, with commas or spaces between them. */
export const itemsIn = (form: FormData, name: string, separator = /,/): string[] =>
  (form.get(name)?.toString() ?? '')
    .split(separator)
    .map((item) => item.trim())
    .filter((item) => item !== '');

/** A local time as the edge takes it, by the field's name; nothing where the field was left empty. */
export function timeIn(form: FormData, name: string): Record<string, string> {
  const value = form.get(name)?.toString();
  return value === undefined ? {} : { [name]: new Date(value).toISOString() };
}
