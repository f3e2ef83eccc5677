;; Sums scaled int8 rows, eight numbers a step: sum[i] += scale[id] · vector[id][i], row after row in the order of the
;; ids, every product and every sum rounded to 32 bits. `weighted-sum.ts` lays the memory out and says what each part is.
;; `weighted-sum.wasm` is this file assembled (`npm run kernel`); a test compares them.
(module
  (import "env" "memory" (memory 1))
  (func (export "addRows")
    (param $id i32) (param $idEnd i32) ;; addresses: of the first id, and behind the last; i32 each
    (param $scales i32)                ;; f32 a token
    (param $vectors i32)               ;; i8 [tokens, stride]
    (param $stride i32)                ;; numbers a row, a multiple of eight
    (param $sum i32)                   ;; f32 [stride]
    (local $token i32) (local $row i32) (local $rowEnd i32) (local $out i32)
    (local $scale v128) (local $eight v128)
    (block $done
      (loop $nextRow
        (br_if $done (i32.ge_u (local.get $id) (local.get $idEnd)))
        (local.set $token (i32.load (local.get $id)))
        (local.set $scale
          (v128.load32_splat (i32.add (local.get $scales) (i32.shl (local.get $token) (i32.const 2)))))
        (local.set $row (i32.add (local.get $vectors) (i32.mul (local.get $token) (local.get $stride))))
        (local.set $rowEnd (i32.add (local.get $row) (local.get $stride)))
        (local.set $out (local.get $sum))
        (loop $nextEight
          (local.set $eight (v128.load8x8_s (local.get $row)))
          (v128.store (local.get $out)
            (f32x4.add (v128.load (local.get $out))
              (f32x4.mul (local.get $scale)
                (f32x4.convert_i32x4_s (i32x4.extend_low_i16x8_s (local.get $eight))))))
          (v128.store offset=16 (local.get $out)
            (f32x4.add (v128.load offset=16 (local.get $out))
              (f32x4.mul (local.get $scale)
                (f32x4.convert_i32x4_s (i32x4.extend_high_i16x8_s (local.get $eight))))))
          (local.set $row (i32.add (local.get $row) (i32.const 8)))
          (local.set $out (i32.add (local.get $out) (i32.const 32)))
          (br_if $nextEight (i32.lt_u (local.get $row) (local.get $rowEnd))))
        (local.set $id (i32.add (local.get $id) (i32.const 4)))
        (br $nextRow)))))
