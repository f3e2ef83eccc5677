/** The live mask set as a heat map. */
import { MaskHeatMap } from '../components/mask-heat-map.tsx';
import { Loaded } from '../components/notice.tsx';
import { NothingLive, SetSummary } from '../components/set-summary.tsx';
import { useLiveSet } from '../live-set.ts';

export function LiveMasks() {
  const live = useLiveSet();
  return (
    <Loaded load={live}>
      {(found) =>
        found === null ? (
          <NothingLive />
        ) : (
          <>
            <SetSummary {...found} />
            <MaskHeatMap set={found.set} />
          </>
        )
      }
    </Loaded>
  );
}
