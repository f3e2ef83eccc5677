/** The platform compiles these modules when the worker is deployed; nothing may be compiled later. */
declare module '*.wasm' {
  const module: WebAssembly.Module;
  export default module;
}
