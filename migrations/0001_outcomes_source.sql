CREATE TABLE `__new_outcomes` (
	`minute` integer NOT NULL,
	`tenant` text NOT NULL,
	`model` text NOT NULL,
	`version` text NOT NULL,
	`cluster` integer NOT NULL,
	`mask` text NOT NULL,
	`sparsity` real NOT NULL,
	`fallback` text NOT NULL,
	`experiment` text NOT NULL,
	`variant` text NOT NULL,
	`region` text NOT NULL,
	`source` text DEFAULT 'client' NOT NULL,
	`requests` integer NOT NULL,
	`errors` integer NOT NULL,
	`ttft_count` integer NOT NULL,
	`ttft_sum` real NOT NULL,
	`ttft_sq` real NOT NULL,
	`tpot_count` integer NOT NULL,
	`tpot_sum` real NOT NULL,
	`tpot_sq` real NOT NULL,
	`prompt_tokens` integer NOT NULL,
	`completion_tokens` integer NOT NULL,
	`completion_tokens_sq` real NOT NULL,
	`ratings` integer NOT NULL,
	`ratings_up` integer NOT NULL,
	`agreement_count` integer NOT NULL,
	`agreement_sum` real NOT NULL,
	`agreement_sq` real NOT NULL,
	`outages` integer DEFAULT 0 NOT NULL,
	`saved_count` integer DEFAULT 0 NOT NULL,
	`saved_sum` real DEFAULT 0 NOT NULL,
	`saved_sq` real DEFAULT 0 NOT NULL,
	PRIMARY KEY(`minute`, `tenant`, `model`, `version`, `cluster`, `mask`, `sparsity`, `fallback`, `experiment`, `variant`, `region`, `source`)
);
--> statement-breakpoint
INSERT INTO `__new_outcomes`("minute", "tenant", "model", "version", "cluster", "mask", "sparsity", "fallback", "experiment", "variant", "region", "source", "requests", "errors", "ttft_count", "ttft_sum", "ttft_sq", "tpot_count", "tpot_sum", "tpot_sq", "prompt_tokens", "completion_tokens", "completion_tokens_sq", "ratings", "ratings_up", "agreement_count", "agreement_sum", "agreement_sq", "outages", "saved_count", "saved_sum", "saved_sq") SELECT "minute", "tenant", "model", "version", "cluster", "mask", "sparsity", "fallback", "experiment", "variant", "region", 'client', "requests", "errors", "ttft_count", "ttft_sum", "ttft_sq", "tpot_count", "tpot_sum", "tpot_sq", "prompt_tokens", "completion_tokens", "completion_tokens_sq", "ratings", "ratings_up", "agreement_count", "agreement_sum", "agreement_sq", "outages", "saved_count", "saved_sum", "saved_sq" FROM `outcomes`;--> statement-breakpoint
DROP TABLE `outcomes`;--> statement-breakpoint
ALTER TABLE `__new_outcomes` RENAME TO `outcomes`;--> statement-breakpoint
CREATE INDEX `outcomes_version` ON `outcomes` (`version`,`minute`);--> statement-breakpoint
CREATE INDEX `outcomes_tenant` ON `outcomes` (`tenant`,`minute`);