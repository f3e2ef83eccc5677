/** What is known of one thing: names and values. */
export type FactList = readonly (readonly [name: string, value: string])[];

export const Facts = ({ facts }: { readonly facts: FactList }) => (
  <dl class="facts">
    {facts.map(([name, value]) => (
      <div key={name}>
        <dt>{name}</dt>
        <dd>{value}</dd>
      </div>
    ))}
  </dl>
);
