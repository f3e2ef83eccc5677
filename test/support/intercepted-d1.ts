/** The real D1 behind a door: each question goes through `ask`, which may keep it waiting or fail it. */

type Statement = { bind(...values: unknown[]): Statement };
type Database = { prepare(sql: string): Statement; batch(statements: readonly object[]): unknown };

export function interceptedD1<D1 extends object>(d1: D1, ask: (question: () => unknown) => unknown): D1 {
  const wrapped = new WeakMap<object, Statement>();
  const wrap = (statement: Statement): Statement => {
    const proxy = new Proxy(statement, {
      get(target, name) {
        const value = Reflect.get(target, name, target);
        if (typeof value !== 'function') return value;
        if (name === 'bind') return (...values: unknown[]) => wrap(target.bind(...values));
        return (...values: unknown[]) => ask(() => value.apply(target, values));
      },
    });
    wrapped.set(proxy, statement);
    return proxy;
  };
  return new Proxy(d1, {
    get(target, name) {
      const database = target as unknown as Database;
      if (name === 'prepare') return (sql: string) => wrap(database.prepare(sql));
      if (name === 'batch') {
        return (statements: object[]) =>
          ask(() => database.batch(statements.map((statement) => wrapped.get(statement) ?? statement)));
      }
      const value = Reflect.get(target, name, target);
      return typeof value === 'function' ? value.bind(target) : value;
    },
  });
}
